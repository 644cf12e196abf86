use std::io::Write;

use flate2::{Compression, GzBuilder, write::ZlibEncoder};
use prost::Message;
use proto::inference::{
    ModelInferRequest, RepositoryModelLoadRequest,
    model_infer_request::{InferInputTensor, InferRequestedOutputTensor},
};

use super::*;

const LIMIT: usize = 1 << 20;

#[test]
fn the_name_is_found_in_any_order_of_fields_and_any_split_of_bytes() {
    for message in in_every_rotation(&fields_of_a_request()) {
        assert_eq!(ModelInferRequest::decode(message.as_slice()).unwrap(), request());
        for (flag, encoding, body) in encodings(&message) {
            let body = framed(flag, &body);
            for at in 0..=body.len() {
                let (head, tail) = body.split_at(at);
                assert_eq!(read(1, encoding, [head, tail]), found("llama"), "{encoding:?} {at}");
            }
            assert_eq!(read(1, encoding, body.chunks(1)), found("llama"), "{encoding:?}");
        }
    }
}

#[test]
fn other_fields_can_be_wanted() {
    let load = RepositoryModelLoadRequest {
        repository_name: "models".to_owned(),
        model_name: "llama".to_owned(),
        ..Default::default()
    };
    let body = framed(0, &load.encode_to_vec());
    assert_eq!(read(2, Encoding::Identity, [body.as_slice()]), found("llama"));
}

#[test]
fn the_answer_comes_with_the_last_byte_of_the_name() {
    let body = framed(0, &request().encode_to_vec());
    let name_ends = 5 + 2 + "llama".len();
    let mut reader = ModelReader::new(1, Encoding::Identity, LIMIT);
    assert_eq!(*reader.push(&body[..name_ends - 1]), Progress::NeedMore);
    assert_eq!(*reader.push(&body[name_ends - 1..name_ends]), found("llama"));
    assert_eq!(*reader.push(b"anything"), found("llama"));
    assert_eq!(*reader.end(), found("llama"));
}

#[test]
fn tensors_before_the_name_are_skipped_up_to_the_limit() {
    let tensor = field(7, &vec![0xff; 3 << 20]);
    let message = [tensor.clone(), field(1, b"llama")].concat();
    for (flag, encoding, body) in encodings(&message) {
        let body = framed(flag, &body);
        let mut roomy = ModelReader::new(1, encoding, 4 << 20);
        body.chunks(10_000).for_each(|piece| {
            roomy.push(piece);
        });
        assert_eq!(*roomy.progress(), found("llama"), "{encoding:?}");

        let mut tight = ModelReader::new(1, encoding, tensor.len());
        body.chunks(10_000).for_each(|piece| {
            tight.push(piece);
        });
        assert_eq!(*tight.progress(), unreadable(ReadError::TooFar { limit: tensor.len() }));
    }
}

#[test]
fn a_field_that_reaches_beyond_the_limit_is_refused_before_its_bytes_come() {
    let body = framed(0, &field(7, &vec![0; LIMIT]));
    assert_eq!(
        read(1, Encoding::Identity, [&body[..20]]),
        unreadable(ReadError::TooFar { limit: LIMIT })
    );
}

#[test]
fn a_bomb_costs_no_more_than_the_limit() {
    let small_fields = [0x10, 0x00].repeat(16 << 20);
    for (flag, encoding, body) in encodings(&small_fields).into_iter().skip(1) {
        assert!(body.len() < LIMIT, "the bomb is small: {}", body.len());
        let mut reader = ModelReader::new(1, encoding, LIMIT);
        assert_eq!(
            *reader.push(&framed(flag, &body)),
            unreadable(ReadError::TooFar { limit: LIMIT })
        );
        assert_eq!(reader.fields.looked_at(), LIMIT);
    }
}

#[test]
fn a_compressed_stream_that_never_yields_a_byte_ends_at_the_limit() {
    // A zlib header, then empty stored blocks (RFC 1951 §3.2.4) without end.
    let mut body = vec![0x78, 0x9c];
    while body.len() <= LIMIT {
        body.extend_from_slice(&[0, 0, 0, 0xff, 0xff]);
    }
    let body = framed(1, &body);
    assert_eq!(
        read(1, Encoding::Deflate, body.chunks(1000)),
        unreadable(ReadError::TooFar { limit: LIMIT })
    );
}

#[test]
fn a_message_of_exactly_the_limit_is_read_to_its_end() {
    let message = [0x10, 0x00].repeat(50);
    let body = framed(0, &message);
    let mut exact = ModelReader::new(1, Encoding::Identity, 100);
    assert_eq!(*exact.push(&body), Progress::Absent);
    let mut short = ModelReader::new(1, Encoding::Identity, 99);
    assert_eq!(*short.push(&body), unreadable(ReadError::TooFar { limit: 99 }));
}

#[test]
fn a_message_without_a_name_says_so() {
    let unnamed = ModelInferRequest { model_name: String::new(), ..request() };
    let explicitly_empty = [field(1, b""), unnamed.encode_to_vec()].concat();
    for message in [Vec::new(), unnamed.encode_to_vec(), explicitly_empty] {
        for (flag, encoding, body) in encodings(&message) {
            let body = framed(flag, &body);
            assert_eq!(read(1, encoding, body.chunks(1)), Progress::Absent, "{encoding:?}");
        }
    }
    assert_eq!(read(1, Encoding::Identity, []), Progress::Absent);
}

#[test]
fn an_empty_name_does_not_hide_a_later_one() {
    let body = framed(0, &[field(1, b""), field(1, b"llama"), field(1, b"other")].concat());
    assert_eq!(read(1, Encoding::Identity, [body.as_slice()]), found("llama"));
}

#[test]
fn only_the_first_message_is_read() {
    let body = [framed(0, &[]), framed(0, &field(1, b"llama"))].concat();
    assert_eq!(read(1, Encoding::Identity, [body.as_slice()]), Progress::Absent);
}

#[test]
fn a_cut_anywhere_before_the_name_ends_is_truncated() {
    let message = fields_of_a_request().into_iter().rev().collect::<Vec<_>>().concat();
    for (flag, encoding, body) in encodings(&message) {
        let body = framed(flag, &body);
        for at in 1..body.len() {
            let progress = read(1, encoding, [&body[..at]]);
            let full = progress == found("llama");
            assert!(full || progress == unreadable(ReadError::Truncated), "{encoding:?} {at}");
            // The name is the last field, so uncompressed nothing short of everything has it.
            assert!(!full || flag == 1, "{encoding:?} {at}");
        }
        // The same, with a prefix that claims the shorter length.
        for at in 1..message.len() {
            let cut = framed(0, &message[..at]);
            let progress = read(1, Encoding::Identity, [cut.as_slice()]);
            assert!(
                matches!(&progress, Progress::Absent | Progress::Unreadable(ReadError::Truncated)),
                "{at} {progress:?}"
            );
        }
    }
}

#[test]
fn what_is_no_request_is_unreadable() {
    let varint_too_long = [0x10, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x02];
    let cases: [(&str, &[u8]); 8] = [
        ("field number 0", &[0x00, 0x00]),
        ("wire type 6", &[0x16]),
        ("wire type 7", &[0x17]),
        ("a tag of more than 32 bits", &[0x80, 0x80, 0x80, 0x80, 0x10]),
        ("a varint of more than 64 bits", &varint_too_long),
        ("a name that is a number", &[0x08, 0x01]),
        ("the end of a group that never began", &[0x14]),
        ("the end of another group", &[0x1b, 0x24]),
    ];
    for (what, message) in cases {
        let body = framed(0, message);
        assert_eq!(
            read(1, Encoding::Identity, [body.as_slice()]),
            unreadable(ReadError::Malformed),
            "{what}"
        );
    }
    let nested = framed(0, &[0x13].repeat(101));
    assert_eq!(read(1, Encoding::Identity, [nested.as_slice()]), unreadable(ReadError::Malformed));
    let open = framed(0, &[0x13]);
    assert_eq!(read(1, Encoding::Identity, [open.as_slice()]), unreadable(ReadError::Truncated));
}

#[test]
fn a_field_of_a_group_is_not_the_messages_own() {
    let group = [vec![0x13], field(1, b"inner"), vec![0x14]].concat();
    let body = framed(0, &[group, field(1, b"llama")].concat());
    assert_eq!(read(1, Encoding::Identity, [body.as_slice()]), found("llama"));
}

#[test]
fn fixed_width_fields_are_skipped() {
    let fixed = [0x11, 1, 2, 3, 4, 5, 6, 7, 8, 0x1d, 1, 2, 3, 4];
    let body = framed(0, &[fixed.as_slice(), &field(1, b"llama")].concat());
    assert_eq!(read(1, Encoding::Identity, body.chunks(3)), found("llama"));
}

#[test]
fn a_name_must_be_a_models() {
    let reading = |name: &[u8]| {
        let body = framed(0, &field(1, name));
        read(1, Encoding::Identity, [body.as_slice()])
    };
    assert_eq!(reading(b"\xff\xfe"), unreadable(ReadError::NameText));
    assert_eq!(reading(&[b'x'; 512]), found(&"x".repeat(512)));
    for bad in [b"a\nb".as_slice(), &[b'x'; 513]] {
        assert!(matches!(reading(bad), Progress::Unreadable(ReadError::Name(_))), "{bad:?}");
    }
    assert_eq!(reading(&[b'x'; 5000]), unreadable(ReadError::NameLength { bytes: 5000 }));
}

#[test]
fn flags_and_encodings_must_agree() {
    let body = framed(1, &gzip(&request().encode_to_vec()));
    for encoding in [Encoding::Identity, Encoding::Other] {
        assert_eq!(read(1, encoding, [body.as_slice()]), unreadable(ReadError::Encoding));
    }
    assert_eq!(
        read(1, Encoding::Deflate, [body.as_slice()]),
        unreadable(ReadError::Compressed),
        "gzip is not deflate"
    );
    let plain = framed(0, &request().encode_to_vec());
    for encoding in [Encoding::Identity, Encoding::Gzip, Encoding::Deflate, Encoding::Other] {
        assert_eq!(read(1, encoding, [plain.as_slice()]), found("llama"), "{encoding:?}");
    }
    let odd = framed(2, &[]);
    assert_eq!(read(1, Encoding::Gzip, [odd.as_slice()]), unreadable(ReadError::Flag { flag: 2 }));
}

#[test]
fn headers_name_encodings() {
    for (value, want) in [
        (None, Encoding::Identity),
        (Some("identity"), Encoding::Identity),
        (Some("gzip"), Encoding::Gzip),
        (Some("deflate"), Encoding::Deflate),
        (Some("snappy"), Encoding::Other),
        (Some(""), Encoding::Other),
    ] {
        assert_eq!(Encoding::from_header(value.map(str::as_bytes)), want, "{value:?}");
    }
}

#[test]
fn every_part_of_a_gzip_header_is_passed() {
    let message = request().encode_to_vec();
    let mut encoder = GzBuilder::new()
        .extra([7; 300])
        .filename("a file")
        .comment("a comment")
        .write(Vec::new(), Compression::default());
    encoder.write_all(&message).unwrap();
    let full = encoder.finish().unwrap();
    let body = framed(1, &full);
    for at in 0..body.len() {
        let (head, tail) = body.split_at(at);
        assert_eq!(read(1, Encoding::Gzip, [head, tail]), found("llama"), "{at}");
    }

    // A header checksum, which the encoder never writes; its value is not looked at.
    let mut checked = gzip(&message);
    checked[3] |= 1 << 1;
    checked.splice(10..10, [0xab, 0xcd]);
    // An extra part of no bytes.
    let mut empty_extra = gzip(&message);
    empty_extra[3] |= 1 << 2;
    empty_extra.splice(10..10, [0, 0]);
    for body in [framed(1, &checked), framed(1, &empty_extra)] {
        assert_eq!(read(1, Encoding::Gzip, body.chunks(1)), found("llama"));
    }

    let mut reserved = gzip(&message);
    reserved[3] |= 1 << 7;
    let body = framed(1, &reserved);
    assert_eq!(read(1, Encoding::Gzip, [body.as_slice()]), unreadable(ReadError::Compressed));
}

#[test]
fn a_second_gzip_member_does_not_go_unnoticed() {
    let body = framed(1, &[gzip(&field(3, b"id")), gzip(&field(1, b"llama"))].concat());
    assert_eq!(read(1, Encoding::Gzip, body.chunks(1)), unreadable(ReadError::Compressed));
}

#[test]
fn no_bytes_make_it_panic_and_their_split_makes_no_difference() {
    let seed = 0x9e37_79b9_7f4a_7c15;
    let mut rng = Xorshift(seed);
    for round in 0..20_000 {
        let encoding =
            [Encoding::Identity, Encoding::Gzip, Encoding::Deflate, Encoding::Other][rng.below(4)];
        let body = match rng.below(4) {
            0 => (0..rng.below(64)).map(|_| rng.byte()).collect(),
            1 => {
                let length = rng.below(64);
                let noise: Vec<u8> = (0..length).map(|_| rng.byte()).collect();
                framed((rng.below(4) == 0).into(), &noise)
            }
            _ => {
                let mut fields = fields_of_a_request();
                let by = rng.below(fields.len());
                fields.rotate_left(by);
                let message = fields.concat();
                let (flag, body) = match encoding {
                    Encoding::Gzip => (1, gzip(&message)),
                    Encoding::Deflate => (1, deflate(&message)),
                    Encoding::Identity | Encoding::Other => (0, message),
                };
                let mut body = framed(flag, &body);
                for _ in 0..rng.below(4) {
                    let at = rng.below(body.len());
                    body[at] = rng.byte();
                }
                body
            }
        };
        let at_once = read(1, encoding, [body.as_slice()]);
        let mut pieces = Vec::new();
        let mut rest = body.as_slice();
        while !rest.is_empty() {
            let (piece, more) = rest.split_at(1 + rng.below(rest.len()));
            pieces.push(piece);
            rest = more;
        }
        let in_pieces = read(1, encoding, pieces);
        assert_eq!(at_once, in_pieces, "seed {seed:#x} round {round} {encoding:?} {body:?}");
        if at_once == Progress::Absent && body.first() == Some(&0) {
            let length = u32::from_be_bytes(body[1..5].try_into().unwrap()) as usize;
            if let Ok(decoded) = ModelInferRequest::decode(&body[5..5 + length]) {
                assert_eq!(decoded.model_name, "", "seed {seed:#x} round {round} {body:?}");
            }
        }
    }
}

fn request() -> ModelInferRequest {
    ModelInferRequest {
        model_name: "llama".to_owned(),
        model_version: "1".to_owned(),
        id: "a-call".to_owned(),
        inputs: vec![InferInputTensor {
            name: "INPUT0".to_owned(),
            datatype: "FP32".to_owned(),
            shape: vec![1, 300],
            ..Default::default()
        }],
        outputs: vec![InferRequestedOutputTensor {
            name: "OUTPUT0".to_owned(),
            ..Default::default()
        }],
        raw_input_contents: vec![(0..150).collect::<Vec<u8>>().into()],
        ..Default::default()
    }
}

/// The fields of [`request`] encoded one by one, the model's name first.
fn fields_of_a_request() -> Vec<Vec<u8>> {
    let whole = request();
    let parts = [
        ModelInferRequest { model_name: whole.model_name, ..Default::default() },
        ModelInferRequest { model_version: whole.model_version, ..Default::default() },
        ModelInferRequest { id: whole.id, ..Default::default() },
        ModelInferRequest { inputs: whole.inputs, ..Default::default() },
        ModelInferRequest { outputs: whole.outputs, ..Default::default() },
        ModelInferRequest { raw_input_contents: whole.raw_input_contents, ..Default::default() },
    ];
    parts.iter().map(Message::encode_to_vec).collect()
}

fn in_every_rotation(fields: &[Vec<u8>]) -> Vec<Vec<u8>> {
    (0..fields.len())
        .map(|by| {
            let mut fields = fields.to_vec();
            fields.rotate_left(by);
            fields.concat()
        })
        .collect()
}

/// A length-delimited field.
fn field(number: u32, content: &[u8]) -> Vec<u8> {
    let mut field = Vec::new();
    prost::encoding::encode_key(number, prost::encoding::WireType::LengthDelimited, &mut field);
    prost::encoding::encode_varint(content.len() as u64, &mut field);
    field.extend_from_slice(content);
    field
}

/// A message as identity, gzip and deflate: flag, encoding, content.
fn encodings(message: &[u8]) -> [(u8, Encoding, Vec<u8>); 3] {
    [
        (0, Encoding::Identity, message.to_vec()),
        (1, Encoding::Gzip, gzip(message)),
        (1, Encoding::Deflate, deflate(message)),
    ]
}

fn gzip(message: &[u8]) -> Vec<u8> {
    let mut encoder = GzBuilder::new().write(Vec::new(), Compression::default());
    encoder.write_all(message).unwrap();
    encoder.finish().unwrap()
}

fn deflate(message: &[u8]) -> Vec<u8> {
    let mut encoder = ZlibEncoder::new(Vec::new(), Compression::default());
    encoder.write_all(message).unwrap();
    encoder.finish().unwrap()
}

fn framed(flag: u8, message: &[u8]) -> Vec<u8> {
    let length = u32::try_from(message.len()).unwrap().to_be_bytes();
    [&[flag], length.as_slice(), message].concat()
}

fn read<'a>(
    field: u32,
    encoding: Encoding,
    pieces: impl IntoIterator<Item = &'a [u8]>,
) -> Progress {
    let mut reader = ModelReader::new(field, encoding, LIMIT);
    for piece in pieces {
        reader.push(piece);
    }
    reader.end();
    reader.into_progress()
}

fn found(name: &str) -> Progress {
    Progress::Found(name.parse().unwrap())
}

fn unreadable(error: ReadError) -> Progress {
    Progress::Unreadable(error)
}

/// Marsaglia's xorshift64: enough chance for a test, the same every run.
struct Xorshift(u64);

impl Xorshift {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, bound: usize) -> usize {
        usize::try_from(self.next() % bound as u64).unwrap()
    }

    fn byte(&mut self) -> u8 {
        self.next().to_le_bytes()[3]
    }
}
