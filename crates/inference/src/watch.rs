//! Which models does a body name, in all its messages and in all of each? For who must know before an engine does.
//!
//! Where to send a call is decided by the first name ([`crate::ModelReader`]). What may be called is not: protobuf lets a later
//! occurrence of a field override the first, and each message of a stream may name a model of its own.

use base::ModelName;

use crate::{Encoding, ReadError, fields::Fields, inflate::Inflate};

/// Flag byte and length.
const PREFIX_BYTES: usize = 5;
/// A compressed message that is longer, compressed or not, is refused: undoing it is work done for the caller.
const COMPRESSED_BYTES_MAX: usize = 16 << 20;

/// Watches a body that is relayed, piece by piece. Holds a name and, for a compressed message, a window of 32 KiB.
#[derive(Debug)]
pub struct ModelWatch {
    field: u32,
    encoding: Encoding,
    part: Part,
}

/// Where in the body the next byte lies.
#[derive(Debug)]
enum Part {
    Prefix { bytes: [u8; PREFIX_BYTES], have: usize },
    Message { left: usize, fields: Fields, inflate: Option<Box<Inflate>> },
}

impl Part {
    fn next() -> Self {
        Self::Prefix { bytes: [0; PREFIX_BYTES], have: 0 }
    }
}

impl ModelWatch {
    /// A watch for the string field numbered `field`, over a body whose headers say `encoding`.
    #[must_use]
    pub fn new(field: u32, encoding: Encoding) -> Self {
        Self { field, encoding, part: Part::next() }
    }

    /// The models that are named up to the end of `data`, since the last piece.
    ///
    /// # Errors
    /// The body cannot be read; it must not be passed on.
    pub fn push(&mut self, mut data: &[u8]) -> Result<Vec<ModelName>, ReadError> {
        let mut names = Vec::new();
        while !data.is_empty() {
            match &mut self.part {
                Part::Prefix { bytes, have } => {
                    let (prefix, rest) = data.split_at(data.len().min(PREFIX_BYTES - *have));
                    bytes[*have..*have + prefix.len()].copy_from_slice(prefix);
                    *have += prefix.len();
                    data = rest;
                    if *have == PREFIX_BYTES {
                        let prefix = *bytes;
                        self.part = self.message(prefix)?;
                    }
                }
                Part::Message { left, fields, inflate } => {
                    let (piece, rest) = data.split_at(data.len().min(*left));
                    match inflate {
                        Some(inflate) => inflate.push(piece, fields)?,
                        None => fields.push(piece)?,
                    };
                    names.append(&mut fields.take());
                    *left -= piece.len();
                    data = rest;
                    if *left == 0 {
                        match inflate {
                            Some(inflate) => inflate.end(fields)?,
                            None => fields.end()?,
                        }
                        self.part = Part::next();
                    }
                }
            }
        }
        Ok(names)
    }

    fn message(&self, [flag, length @ ..]: [u8; PREFIX_BYTES]) -> Result<Part, ReadError> {
        let inflate = match (flag, self.encoding) {
            (0, _) => None,
            (1, Encoding::Gzip) => Some(Box::new(Inflate::gzip(COMPRESSED_BYTES_MAX))),
            (1, Encoding::Deflate) => Some(Box::new(Inflate::zlib(COMPRESSED_BYTES_MAX))),
            (1, Encoding::Identity | Encoding::Other) => return Err(ReadError::Encoding),
            _ => return Err(ReadError::Flag { flag }),
        };
        let left = u32::from_be_bytes(length) as usize;
        if left == 0 {
            return if inflate.is_none() { Ok(Part::next()) } else { Err(ReadError::Truncated) };
        }
        let limit = if inflate.is_some() { COMPRESSED_BYTES_MAX } else { usize::MAX };
        Ok(Part::Message { left, fields: Fields::to_the_end(self.field, limit), inflate })
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use flate2::{Compression, write::GzEncoder};

    use super::*;

    fn field(number: u8, text: &[u8]) -> Vec<u8> {
        [&[number << 3 | 2, u8::try_from(text.len()).unwrap()][..], text].concat()
    }

    fn framed(flag: u8, message: &[u8]) -> Vec<u8> {
        let length = u32::try_from(message.len()).unwrap().to_be_bytes();
        [&[flag][..], &length, message].concat()
    }

    fn gzipped(message: &[u8]) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
        encoder.write_all(message).unwrap();
        encoder.finish().unwrap()
    }

    fn names(encoding: Encoding, body: &[u8], piece: usize) -> Result<Vec<String>, ReadError> {
        let mut watch = ModelWatch::new(1, encoding);
        let mut all = Vec::new();
        for piece in body.chunks(piece) {
            all.extend(watch.push(piece)?.iter().map(ToString::to_string));
        }
        Ok(all)
    }

    #[test]
    fn every_name_of_every_message_is_seen() {
        let twice = [field(1, b"llama"), field(7, b"tensor"), field(1, b"secret")].concat();
        let other = [field(7, b"tensor"), field(1, b"other")].concat();
        for (encoding, body) in [
            (Encoding::Identity, [framed(0, &twice), framed(0, b""), framed(0, &other)].concat()),
            (Encoding::Gzip, [framed(1, &gzipped(&twice)), framed(0, &other)].concat()),
            (Encoding::Gzip, [framed(0, &twice), framed(1, &gzipped(&other))].concat()),
        ] {
            for piece in 1..=body.len() {
                let want = ["llama", "secret", "other"].map(str::to_owned);
                assert_eq!(names(encoding, &body, piece).unwrap(), want, "{encoding:?} {piece}");
            }
        }
    }

    #[test]
    fn what_cannot_be_read_is_no_name() {
        let message = field(1, b"llama");
        let second = [gzipped(b""), gzipped(&message)].concat();
        let bomb = gzipped(&vec![0x3a; 40 << 20]);
        for (encoding, body) in [
            (Encoding::Identity, framed(1, &gzipped(&message))),
            (Encoding::Other, framed(1, b"zstd")),
            (Encoding::Gzip, framed(1, b"")),
            (Encoding::Gzip, framed(1, &second)),
            (Encoding::Gzip, framed(1, &bomb)),
            (Encoding::Gzip, framed(7, &message)),
            (Encoding::Identity, framed(0, b"\x0a")),
            (Encoding::Identity, framed(0, b"\x08\x01")),
            (Encoding::Identity, framed(0, &field(1, b"a").repeat(100))),
        ] {
            let start = &body[..body.len().min(20)];
            assert!(names(encoding, &body, 1000).is_err(), "{encoding:?} {start:?}");
        }
    }

    #[test]
    fn a_long_message_is_walked_past_without_being_held() {
        let tensor = vec![0; 32 << 20];
        let length = [0x3a, 0x80, 0x80, 0x80, 0x10];
        let message = [&field(1, b"llama")[..], &length, &tensor, &field(1, b"b")].concat();
        let found = names(Encoding::Identity, &framed(0, &message), 1 << 16).unwrap();
        assert_eq!(found, ["llama", "b"]);
    }
}
