//! QUIC variable-length integers (RFC 9000 §16).

use bytes::BufMut;

/// Writes `value`; values above 2^62 - 1 do not exist and are written as that bound.
pub(crate) fn put(out: &mut impl BufMut, value: u64) {
    match value {
        0..=0x3f => out.put_u8(value.to_le_bytes()[0]),
        0x40..=0x3fff => out.put_slice(&(0x4000 | value).to_be_bytes()[6..]),
        0x4000..=0x3fff_ffff => out.put_slice(&(0x8000_0000 | value).to_be_bytes()[4..]),
        _ => out.put_u64((0b11 << 62) | value.min((1 << 62) - 1)),
    }
}

/// Reads an integer from the front of `input`: its value and its length, or `None` when more bytes are needed.
pub(crate) fn read(input: &[u8]) -> Option<(u64, usize)> {
    let first = *input.first()?;
    let length = 1usize << (first >> 6);
    let bytes = input.get(..length)?;
    let value = bytes[1..]
        .iter()
        .fold(u64::from(first & 0x3f), |value, byte| (value << 8) | u64::from(*byte));
    Some((value, length))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_examples_of_rfc_9000_appendix_a_are_read() {
        let examples: [(&[u8], u64); 5] = [
            (&[0xc2, 0x19, 0x7c, 0x5e, 0xff, 0x14, 0xe8, 0x8c], 151_288_809_941_952_652),
            (&[0x9d, 0x7f, 0x3e, 0x7d], 494_878_333),
            (&[0x7b, 0xbd], 15_293),
            (&[0x25], 37),
            (&[0x40, 0x25], 37),
        ];
        for (bytes, want) in examples {
            assert_eq!(read(bytes), Some((want, bytes.len())));
            assert_eq!(read(&bytes[..bytes.len() - 1]), None);
        }
    }

    #[test]
    fn what_is_written_reads_back() {
        for value in [0, 63, 64, 16_383, 16_384, (1 << 30) - 1, 1 << 30, (1 << 62) - 1] {
            let mut out = Vec::new();
            put(&mut out, value);
            assert_eq!(read(&out), Some((value, out.len())));
        }
    }
}
