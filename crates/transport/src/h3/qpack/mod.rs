//! QPACK (RFC 9204) without a dynamic table: the decoder allows none (`SETTINGS_QPACK_MAX_TABLE_CAPACITY` 0), so no
//! stream ever waits for another, and the encoder uses the static table and plain literals.

mod huffman;
mod static_table;

use bytes::{BufMut, Bytes, BytesMut};
use static_table::{Match, STATIC_TABLE};

/// RFC 9114 §4.2.2: what a field line counts beyond its name and value.
const LINE_OVERHEAD_BYTES: usize = 32;

/// Why a field section cannot be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum QpackError {
    /// The peer broke RFC 9204: a connection error (QPACK_DECOMPRESSION_FAILED).
    #[error("the field section breaks RFC 9204: {0}")]
    Malformed(&'static str),
    /// The section is longer than this end accepts: an error of this request only.
    #[error("the field section is longer than {limit_bytes} bytes")]
    TooLong {
        /// The bound it broke, in bytes as RFC 9114 §4.2.2 counts them.
        limit_bytes: usize,
    },
}

/// Writes field lines as one encoded field section.
#[derive(Debug)]
pub struct Encoder(BytesMut);

impl Encoder {
    /// An empty section, appended to `out`.
    #[must_use]
    pub fn new(mut out: BytesMut) -> Self {
        out.put_slice(&[0, 0]); // Required Insert Count 0, Base 0 (§4.5.1).
        Self(out)
    }

    /// Adds a field line; `name` is in lower case. `secret` keeps it out of every table on the way (§7.1).
    pub fn line(&mut self, name: &str, value: &[u8], secret: bool) {
        let never_indexed = if secret { 0x20 } else { 0 };
        match static_table::find(name, value) {
            // Indexed Field Line, static (§4.5.2): 1 1 index(6+).
            Some(Match::Line(index)) if !secret => {
                put_integer(&mut self.0, 0xc0, 6, usize::from(index));
            }
            // Literal Field Line with Name Reference, static (§4.5.4): 0 1 N 1 index(4+).
            Some(Match::Line(index) | Match::Name(index)) => {
                put_integer(&mut self.0, 0x50 | never_indexed, 4, usize::from(index));
                put_integer(&mut self.0, 0, 7, value.len());
                self.0.put_slice(value);
            }
            // Literal Field Line with Literal Name (§4.5.6): 0 0 1 N H length(3+).
            None => {
                put_integer(&mut self.0, 0x20 | (never_indexed >> 1), 3, name.len());
                self.0.put_slice(name.as_bytes());
                put_integer(&mut self.0, 0, 7, value.len());
                self.0.put_slice(value);
            }
        }
    }

    /// The section.
    #[must_use]
    pub fn finish(self) -> BytesMut {
        self.0
    }
}

/// Reads an encoded field section, calling `line` for each name and value.
///
/// # Errors
/// [`QpackError`] when the section breaks RFC 9204 or its lines count more than `limit_bytes`.
pub fn decode<E: From<QpackError>>(
    section: &Bytes,
    limit_bytes: usize,
    mut line: impl FnMut(Bytes, Bytes) -> Result<(), E>,
) -> Result<(), E> {
    let mut reader = Reader { section, at: 0 };
    if reader.integer(8)? != 0 {
        return Err(malformed("it refers to a dynamic table, and this end allows none"));
    }
    reader.integer(7)?; // Base: without a dynamic table it means nothing.
    let mut size_bytes = 0usize;
    while reader.at < section.len() {
        let (name, value) = reader.line()?;
        size_bytes =
            size_bytes.saturating_add(name.len() + value.len()).saturating_add(LINE_OVERHEAD_BYTES);
        if size_bytes > limit_bytes {
            return Err(QpackError::TooLong { limit_bytes }.into());
        }
        line(name, value)?;
    }
    Ok(())
}

fn malformed<E: From<QpackError>>(why: &'static str) -> E {
    QpackError::Malformed(why).into()
}

struct Reader<'a> {
    section: &'a Bytes,
    at: usize,
}

impl Reader<'_> {
    fn line(&mut self) -> Result<(Bytes, Bytes), QpackError> {
        let first = self.peek()?;
        if first & 0x80 != 0 {
            if first & 0x40 == 0 {
                return Err(malformed("an indexed line refers to the dynamic table"));
            }
            let (name, value) = static_line(self.integer(6)?)?;
            return Ok((Bytes::from_static(name.as_bytes()), Bytes::from_static(value.as_bytes())));
        }
        if first & 0x40 != 0 {
            if first & 0x10 == 0 {
                return Err(malformed("a name refers to the dynamic table"));
            }
            let (name, _) = static_line(self.integer(4)?)?;
            return Ok((Bytes::from_static(name.as_bytes()), self.string(7)?));
        }
        if first & 0x20 != 0 {
            return Ok((self.string(3)?, self.string(7)?));
        }
        Err(malformed("a post-base line refers to the dynamic table"))
    }

    fn peek(&self) -> Result<u8, QpackError> {
        self.section.get(self.at).copied().ok_or_else(|| malformed("it ends inside a line"))
    }

    /// An integer with an `n`-bit prefix (RFC 7541 §5.1), at most 2^28 here: nothing we accept is longer.
    fn integer(&mut self, prefix_bits: u32) -> Result<usize, QpackError> {
        let mask = (1usize << prefix_bits) - 1;
        let mut value = usize::from(self.peek()?) & mask;
        self.at += 1;
        if value < mask {
            return Ok(value);
        }
        for shift in [0, 7, 14, 21] {
            let byte = usize::from(self.peek()?);
            self.at += 1;
            value += (byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(malformed("an integer is longer than 28 bits"))
    }

    /// A string with an `n`-bit length prefix, its Huffman flag just above the prefix.
    fn string(&mut self, prefix_bits: u32) -> Result<Bytes, QpackError> {
        let huffman_coded = self.peek()? & (1 << prefix_bits) != 0;
        let length = self.integer(prefix_bits)?;
        let end = self.at + length;
        if end > self.section.len() {
            return Err(malformed("a string is longer than the section"));
        }
        let raw = self.section.slice(self.at..end);
        self.at = end;
        if !huffman_coded {
            return Ok(raw);
        }
        let mut out = Vec::with_capacity(length * 8 / 5 + 1);
        huffman::decode(&raw, &mut out).map_err(|_| malformed("a string is not Huffman code"))?;
        Ok(out.into())
    }
}

fn static_line(index: usize) -> Result<(&'static str, &'static str), QpackError> {
    STATIC_TABLE.get(index).copied().ok_or_else(|| malformed("an index is beyond the static table"))
}

/// An integer with an `n`-bit prefix (RFC 7541 §5.1) under the pattern bits `first`.
fn put_integer(out: &mut BytesMut, first: u8, prefix_bits: u32, value: usize) {
    let mask = (1usize << prefix_bits) - 1;
    if value < mask {
        out.put_u8(first | low_byte(value));
        return;
    }
    out.put_u8(first | low_byte(mask));
    let mut rest = value - mask;
    while rest >= 0x80 {
        out.put_u8(0x80 | low_byte(rest & 0x7f));
        rest >>= 7;
    }
    out.put_u8(low_byte(rest));
}

fn low_byte(value: usize) -> u8 {
    value.to_le_bytes()[0]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(section: &[u8], limit: usize) -> Result<Vec<(String, String)>, QpackError> {
        let mut out = Vec::new();
        decode::<QpackError>(&Bytes::copy_from_slice(section), limit, |name, value| {
            out.push((
                String::from_utf8_lossy(&name).into_owned(),
                String::from_utf8_lossy(&value).into_owned(),
            ));
            Ok(())
        })?;
        Ok(out)
    }

    fn encoded(lines: &[(&str, &str)]) -> Bytes {
        let mut encoder = Encoder::new(BytesMut::new());
        for (name, value) in lines {
            encoder.line(name, value.as_bytes(), *name == "authorization");
        }
        encoder.finish().freeze()
    }

    #[test]
    fn what_is_encoded_decodes_to_the_same_lines() {
        let long = "v".repeat(5_000);
        let want = [
            (":method", "POST"),
            (":path", "/inference.GRPCInferenceService/ModelInfer"),
            ("content-type", "application/grpc"),
            ("authorization", "Bearer secret"),
            ("x-a-rather-long-header-name-of-our-own", long.as_str()),
            ("grpc-status", ""),
        ];
        let got = lines(&encoded(&want), 16_384).unwrap();
        assert_eq!(got.len(), want.len());
        for ((name, value), (want_name, want_value)) in got.iter().zip(want) {
            assert_eq!((name.as_str(), value.as_str()), (want_name, want_value));
        }
    }

    #[test]
    fn the_first_example_of_rfc_9204_appendix_b_decodes() {
        let section = [&[0x00, 0x00, 0x51, 0x0b][..], b"/index.html"].concat();
        assert_eq!(lines(&section, 100).unwrap(), [(":path".into(), "/index.html".into())]);
    }

    #[test]
    fn dynamic_references_and_cut_sections_are_malformed() {
        let bad: [&[u8]; 9] = [
            &[],
            &[0],
            &[1, 0],
            &[0, 0, 0x80],
            &[0, 0, 0x40, 0],
            &[0, 0, 0x10],
            &[0, 0, 0xff, 0x24],
            &[0, 0, 0x51, 0x0b, b'/'],
            &[0, 0, 0x27, 0xff, 0xff, 0xff, 0xff, 0xff],
        ];
        for section in bad {
            assert!(matches!(lines(section, 100), Err(QpackError::Malformed(_))), "{section:?}");
        }
    }

    #[test]
    fn a_long_section_is_an_error_of_its_own() {
        let section = encoded(&[("a", "b"), ("c", "d")]);
        assert!(lines(&section, 68).is_ok());
        assert_eq!(lines(&section, 67), Err(QpackError::TooLong { limit_bytes: 67 }));
    }

    #[test]
    fn no_bytes_make_it_panic() {
        let mut state = 0x9e37_79b9_7f4a_7c15u64;
        for _ in 0..200_000 {
            let mut section = [0u8; 24];
            for byte in &mut section[2..] {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                *byte = state.to_le_bytes()[3];
            }
            let length = 2 + usize::from(state.to_le_bytes()[5]) % 23;
            drop(lines(&section[..length], 300));
        }
    }
}
