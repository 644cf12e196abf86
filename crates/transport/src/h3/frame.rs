//! HTTP/3 frames (RFC 9114 §7) without IO: bytes in, frames out, nothing held but a bounded field section.

use bytes::{Buf, BufMut, Bytes, BytesMut};

use super::{Code, varint};

const DATA: u64 = 0x00;
const HEADERS: u64 = 0x01;
const CANCEL_PUSH: u64 = 0x03;
const SETTINGS: u64 = 0x04;
const PUSH_PROMISE: u64 = 0x05;
const GOAWAY: u64 = 0x07;
const MAX_PUSH_ID: u64 = 0x0d;

/// Longest SETTINGS payload we read; a real one has a dozen entries.
const SETTINGS_MAX_BYTES: usize = 1024;
/// A frame type and a length, each at most eight bytes.
const HEADER_MAX_BYTES: usize = 16;
/// A reserved frame type (§7.2.8): every peer must ignore it, so an empty one is a ping that needs no answer but an ACK.
const RESERVED: u64 = 0x21;

/// What a stream carried next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Frame {
    /// A piece of a DATA frame; a frame may come in any number of pieces.
    Data(Bytes),
    /// A whole encoded field section.
    Headers(Bytes),
    /// A HEADERS frame longer than this end accepts; its content is skipped.
    HeadersTooLong,
    Settings(Settings),
    /// The first identifier the peer will not serve (§5.2).
    GoAway(u64),
}

/// The settings of the peer that mean something to us.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub(crate) struct Settings {
    /// SETTINGS_MAX_FIELD_SECTION_SIZE; `None`: unlimited.
    pub(crate) max_field_section_bytes: Option<u64>,
}

/// A rule of RFC 9114 the peer broke on the connection: it must be closed with this code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{reason} ({code})")]
pub(crate) struct ConnectionFault {
    pub(crate) code: Code,
    pub(crate) reason: &'static str,
}

fn fault<T>(code: Code, reason: &'static str) -> Result<T, ConnectionFault> {
    Err(ConnectionFault { code, reason })
}

/// Which frames a stream may carry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Request,
    Control,
}

#[derive(Debug)]
enum State {
    /// Collecting type and length.
    Header { bytes: [u8; HEADER_MAX_BYTES], held: usize },
    /// Inside DATA.
    Data { left: u64 },
    /// Inside a frame that is read whole.
    Whole { kind: u64, left: usize, payload: BytesMut },
    /// Inside a frame nobody needs.
    Skip { left: u64 },
}

/// Splits the bytes of one stream into frames.
///
/// ```text
///            type+length                  payload done
///  Header ──────────────> Data | Whole | Skip ──────────> Header
/// ```
#[derive(Debug)]
pub(crate) struct Decoder {
    kind: Kind,
    state: State,
    max_section_bytes: usize,
    settings_seen: bool,
}

impl Decoder {
    /// For a request stream whose field sections may have `max_section_bytes`.
    pub(crate) fn request(max_section_bytes: usize) -> Self {
        Self::new(Kind::Request, max_section_bytes)
    }

    /// For the peer's control stream.
    pub(crate) fn control() -> Self {
        Self::new(Kind::Control, 0)
    }

    fn new(kind: Kind, max_section_bytes: usize) -> Self {
        Self { kind, state: header(), max_section_bytes, settings_seen: false }
    }

    /// Takes bytes off the front of `input` until a frame is complete or the input is empty.
    pub(crate) fn decode(&mut self, input: &mut Bytes) -> Result<Option<Frame>, ConnectionFault> {
        loop {
            match &mut self.state {
                State::Header { bytes, held } => {
                    let Some(byte) = input.first() else { return Ok(None) };
                    // A whole header at once is the rule; byte by byte where it is split.
                    let (kind, length) = if *held == 0
                        && let Some((kind, a)) = varint::read(input)
                        && let Some((length, b)) = varint::read(&input[a..])
                    {
                        input.advance(a + b);
                        (kind, length)
                    } else {
                        bytes[*held] = *byte;
                        *held += 1;
                        input.advance(1);
                        let collected = &bytes[..*held];
                        let Some((kind, a)) = varint::read(collected) else { continue };
                        let Some((length, _)) = varint::read(&collected[a..]) else { continue };
                        (kind, length)
                    };
                    if let Some(frame) = self.begin(kind, length)? {
                        return Ok(Some(frame));
                    }
                }
                State::Data { left: 0 } | State::Skip { left: 0 } => self.state = header(),
                State::Data { left } => {
                    if input.is_empty() {
                        return Ok(None);
                    }
                    let piece = input.split_to(min(input.len(), *left));
                    *left -= piece.len() as u64;
                    return Ok(Some(Frame::Data(piece)));
                }
                State::Skip { left } => {
                    if input.is_empty() {
                        return Ok(None);
                    }
                    let skipped = min(input.len(), *left);
                    input.advance(skipped);
                    *left -= skipped as u64;
                }
                State::Whole { kind, left, payload } => {
                    let taken = (*left).min(input.len());
                    let whole = if payload.is_empty() && taken == *left {
                        input.split_to(taken)
                    } else {
                        payload.put_slice(&input.split_to(taken));
                        *left -= taken;
                        if *left > 0 {
                            return Ok(None);
                        }
                        payload.split().freeze()
                    };
                    let kind = *kind;
                    self.state = header();
                    if let Some(frame) = finish(kind, whole)? {
                        return Ok(Some(frame));
                    }
                }
            }
        }
    }

    /// Whether the stream may end here: between frames.
    pub(crate) fn is_between_frames(&self) -> bool {
        matches!(
            self.state,
            State::Header { held: 0, .. } | State::Data { left: 0 } | State::Skip { left: 0 }
        )
    }

    /// Decides what to do with a frame whose header is complete.
    fn begin(&mut self, kind: u64, length: u64) -> Result<Option<Frame>, ConnectionFault> {
        if self.kind == Kind::Control && !self.settings_seen && kind != SETTINGS {
            return fault(
                Code::MISSING_SETTINGS,
                "the control stream does not begin with SETTINGS",
            );
        }
        let whole = |left: u64| State::Whole {
            kind,
            left: usize::try_from(left).unwrap_or(usize::MAX),
            payload: BytesMut::new(),
        };
        self.state = match (self.kind, kind) {
            (Kind::Request, DATA) if length == 0 => {
                self.state = header();
                return Ok(Some(Frame::Data(Bytes::new())));
            }
            (Kind::Request, DATA) => State::Data { left: length },
            (Kind::Request, HEADERS) if length > self.max_section_bytes as u64 => {
                self.state = State::Skip { left: length };
                return Ok(Some(Frame::HeadersTooLong));
            }
            (Kind::Request, HEADERS) => whole(length),
            (Kind::Control, SETTINGS) if self.settings_seen => {
                return fault(Code::FRAME_UNEXPECTED, "a second SETTINGS frame");
            }
            (Kind::Control, SETTINGS) if length > SETTINGS_MAX_BYTES as u64 => {
                return fault(Code::EXCESSIVE_LOAD, "a SETTINGS frame of more than 1024 bytes");
            }
            (Kind::Control, SETTINGS) => {
                self.settings_seen = true;
                whole(length)
            }
            (Kind::Control, GOAWAY | CANCEL_PUSH | MAX_PUSH_ID) if length > 8 => {
                return fault(Code::FRAME_ERROR, "an identifier frame of more than 8 bytes");
            }
            (Kind::Control, GOAWAY | CANCEL_PUSH | MAX_PUSH_ID) => whole(length),
            (_, DATA | HEADERS | CANCEL_PUSH | SETTINGS | PUSH_PROMISE | GOAWAY | MAX_PUSH_ID) => {
                return fault(Code::FRAME_UNEXPECTED, "a frame its stream may not carry");
            }
            // Types of HTTP/2 without a meaning here (§7.2.8).
            (_, 0x02 | 0x06 | 0x08 | 0x09) => {
                return fault(Code::FRAME_UNEXPECTED, "a frame type reserved from HTTP/2");
            }
            _ => State::Skip { left: length },
        };
        Ok(None)
    }
}

fn header() -> State {
    State::Header { bytes: [0; HEADER_MAX_BYTES], held: 0 }
}

fn min(available: usize, left: u64) -> usize {
    usize::try_from(left).map_or(available, |left| left.min(available))
}

fn finish(kind: u64, payload: Bytes) -> Result<Option<Frame>, ConnectionFault> {
    match kind {
        HEADERS => Ok(Some(Frame::Headers(payload))),
        SETTINGS => settings(&payload).map(|settings| Some(Frame::Settings(settings))),
        _ => match varint::read(&payload) {
            Some((id, length)) if length == payload.len() => {
                Ok((kind == GOAWAY).then_some(Frame::GoAway(id)))
            }
            _ => fault(Code::FRAME_ERROR, "an identifier frame that is not one identifier"),
        },
    }
}

/// §7.2.4: pairs of identifier and value; a repeated identifier or one of HTTP/2's is a connection error.
fn settings(mut payload: &[u8]) -> Result<Settings, ConnectionFault> {
    const MAX_FIELD_SECTION_SIZE: u64 = 0x06;
    let mut settings = Settings::default();
    let mut seen = Vec::new();
    while !payload.is_empty() {
        let Some((id, a)) = varint::read(payload) else {
            return fault(Code::FRAME_ERROR, "SETTINGS end inside an identifier");
        };
        let Some((value, b)) = varint::read(&payload[a..]) else {
            return fault(Code::FRAME_ERROR, "SETTINGS end inside a value");
        };
        payload = &payload[a + b..];
        if seen.contains(&id) {
            return fault(Code::SETTINGS_ERROR, "a setting is repeated");
        }
        seen.push(id);
        match id {
            MAX_FIELD_SECTION_SIZE => settings.max_field_section_bytes = Some(value),
            0x02..=0x05 => {
                return fault(Code::SETTINGS_ERROR, "a setting of HTTP/2");
            }
            _ => {}
        }
    }
    Ok(settings)
}

/// The bytes a control stream begins with: its type, then SETTINGS.
pub(crate) fn control_preface(max_field_section_bytes: usize) -> Bytes {
    let mut payload = BytesMut::new();
    for (id, value) in [(0x01, 0), (0x06, max_field_section_bytes as u64), (0x07, 0)] {
        varint::put(&mut payload, id);
        varint::put(&mut payload, value);
    }
    let mut out = BytesMut::new();
    varint::put(&mut out, 0x00);
    put_header(&mut out, SETTINGS, payload.len());
    out.put_slice(&payload);
    out.freeze()
}

/// A GOAWAY frame (§5.2).
pub(crate) fn goaway(id: u64) -> Bytes {
    let mut payload = BytesMut::new();
    varint::put(&mut payload, id);
    let mut out = BytesMut::new();
    put_header(&mut out, GOAWAY, payload.len());
    out.put_slice(&payload);
    out.freeze()
}

/// An empty frame of a reserved type: it asks the peer for nothing but an ACK.
pub(crate) fn ping() -> Bytes {
    let mut out = BytesMut::with_capacity(2);
    put_header(&mut out, RESERVED, 0);
    out.freeze()
}

/// Header and content of a HEADERS frame, appended to `out`.
pub(crate) fn put_headers(out: &mut BytesMut, section: &[u8]) {
    put_header(out, HEADERS, section.len());
    out.put_slice(section);
}

/// The header of a DATA frame of `length` bytes, appended to `out`.
pub(crate) fn put_data_header(out: &mut BytesMut, length: usize) {
    put_header(out, DATA, length);
}

fn put_header(out: &mut BytesMut, kind: u64, length: usize) {
    varint::put(out, kind);
    varint::put(out, length as u64);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Feeds `bytes` in pieces of `size` and joins neighbouring DATA.
    fn frames(decoder: &mut Decoder, bytes: &[u8], size: usize) -> Result<Vec<Frame>, Code> {
        let mut out: Vec<Frame> = Vec::new();
        for piece in bytes.chunks(size) {
            let mut input = Bytes::copy_from_slice(piece);
            while let Some(frame) = decoder.decode(&mut input).map_err(|fault| fault.code)? {
                match (out.last_mut(), frame) {
                    (Some(Frame::Data(before)), Frame::Data(next)) => {
                        *before = [&before[..], &next[..]].concat().into();
                    }
                    (_, frame) => out.push(frame),
                }
            }
        }
        Ok(out)
    }

    fn frame(kind: u64, payload: &[u8]) -> Vec<u8> {
        let mut out = BytesMut::new();
        put_header(&mut out, kind, payload.len());
        out.put_slice(payload);
        out.to_vec()
    }

    #[test]
    fn a_request_reads_the_same_however_it_is_cut() {
        let bytes = [
            frame(HEADERS, b"section"),
            frame(0x1f * 5 + 0x21, &[7; 3_000]),
            frame(DATA, b""),
            frame(DATA, &[1; 300]),
            frame(HEADERS, b"trailers"),
            frame(0x4000_0000, b"unknown"),
        ]
        .concat();
        for size in [1, 2, 3, 7, 64, bytes.len()] {
            let mut decoder = Decoder::request(100);
            let got = frames(&mut decoder, &bytes, size).unwrap();
            let want = [
                Frame::Headers(Bytes::from_static(b"section")),
                Frame::Data(Bytes::from(vec![1; 300])),
                Frame::Headers(Bytes::from_static(b"trailers")),
            ];
            assert_eq!(got, want, "in pieces of {size}");
            assert!(decoder.is_between_frames());
        }
    }

    #[test]
    fn a_long_header_section_is_skipped_not_held() {
        let mut decoder = Decoder::request(10);
        let bytes = [frame(HEADERS, &[0; 11]), frame(DATA, b"x")].concat();
        let got = frames(&mut decoder, &bytes, 4).unwrap();
        assert_eq!(got, [Frame::HeadersTooLong, Frame::Data(Bytes::from_static(b"x"))]);
    }

    #[test]
    fn an_unknown_frame_of_any_length_costs_no_memory() {
        let mut out = BytesMut::new();
        put_header(&mut out, 0x21, usize::MAX >> 2);
        let mut decoder = Decoder::request(10);
        for _ in 0..100 {
            assert_eq!(frames(&mut decoder, &out, 1 << 16), Ok(vec![]));
            out = BytesMut::zeroed(1 << 16);
        }
        assert!(!decoder.is_between_frames());
    }

    #[test]
    fn frames_on_the_wrong_stream_close_the_connection() {
        for kind in
            [CANCEL_PUSH, SETTINGS, PUSH_PROMISE, GOAWAY, MAX_PUSH_ID, 0x02, 0x06, 0x08, 0x09]
        {
            let got = frames(&mut Decoder::request(10), &frame(kind, &[0]), 9);
            assert_eq!(got, Err(Code::FRAME_UNEXPECTED), "{kind:#x}");
        }
        for kind in [DATA, HEADERS, PUSH_PROMISE, SETTINGS] {
            let bytes = [frame(SETTINGS, &[]), frame(kind, &[0])].concat();
            let got = frames(&mut Decoder::control(), &bytes, 9);
            assert_eq!(got, Err(Code::FRAME_UNEXPECTED), "{kind:#x}");
        }
    }

    #[test]
    fn the_control_stream_carries_settings_then_goaway() {
        let bytes = [&control_preface(16_384)[1..], &ping(), &goaway(400)].concat();
        for size in [1, 5, 100] {
            let got = frames(&mut Decoder::control(), &bytes, size).unwrap();
            let settings = Settings { max_field_section_bytes: Some(16_384) };
            assert_eq!(got, [Frame::Settings(settings), Frame::GoAway(400)]);
        }
        assert_eq!(frames(&mut Decoder::control(), &goaway(0), 9), Err(Code::MISSING_SETTINGS));
    }

    #[test]
    fn bad_settings_close_the_connection() {
        for (payload, code) in [
            (&[0x06, 0x01, 0x06, 0x01][..], Code::SETTINGS_ERROR),
            (&[0x02, 0x01], Code::SETTINGS_ERROR),
            (&[0x06], Code::FRAME_ERROR),
            (&[0x40], Code::FRAME_ERROR),
        ] {
            let got = frames(&mut Decoder::control(), &frame(SETTINGS, payload), 9);
            assert_eq!(got, Err(code), "{payload:?}");
        }
        let many = vec![0x3f; 1025];
        let got = frames(&mut Decoder::control(), &frame(SETTINGS, &many), 2000);
        assert_eq!(got, Err(Code::EXCESSIVE_LOAD));
    }

    #[test]
    fn no_bytes_make_it_panic() {
        let mut state = 0x1234_5678_9abc_def1u64;
        for round in 0..100_000 {
            let mut bytes = [0u8; 32];
            for byte in &mut bytes {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                *byte = state.to_le_bytes()[4] & 0x4f;
            }
            let mut decoder =
                if round % 2 == 0 { Decoder::request(20) } else { Decoder::control() };
            drop(frames(&mut decoder, &bytes, 1 + round % 9));
        }
    }
}
