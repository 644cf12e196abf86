//! RFC 7541 Appendix B: the Huffman code of HPACK and QPACK strings, decoding only.
//!
//! The code is canonical (shorter codes first, equal lengths in symbol order), so the lengths say everything; the
//! decoder tables are derived from them once.

use std::sync::LazyLock;

/// Code length in bits of each byte value; the end-of-string symbol follows as index 256.
#[rustfmt::skip]
const LENGTHS: [u8; 257] = [
    13, 23, 28, 28, 28, 28, 28, 28, 28, 24, 30, 28, 28, 30, 28, 28, 28, 28, 28, 28, 28, 28, 30, 28, 28, 28, 28, 28, 28, 28, 28, 28,
    6, 10, 10, 12, 13, 6, 8, 11, 10, 10, 8, 11, 8, 6, 6, 6, 5, 5, 5, 6, 6, 6, 6, 6, 6, 6, 7, 8, 15, 6, 12, 10,
    13, 6, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 8, 7, 8, 13, 19, 13, 14, 6,
    15, 5, 6, 5, 6, 5, 6, 6, 6, 5, 7, 7, 6, 6, 6, 5, 6, 7, 6, 5, 5, 6, 7, 7, 7, 7, 7, 15, 11, 14, 13, 28,
    20, 22, 20, 20, 22, 22, 22, 23, 22, 23, 23, 23, 23, 23, 24, 23, 24, 24, 22, 23, 24, 23, 23, 23, 23, 21, 22, 23, 22, 23, 23, 24,
    22, 21, 20, 22, 22, 23, 23, 21, 23, 22, 22, 24, 21, 22, 23, 23, 21, 21, 22, 21, 23, 22, 23, 23, 20, 22, 22, 22, 23, 22, 22, 23,
    26, 26, 20, 19, 22, 23, 22, 25, 26, 26, 26, 27, 27, 26, 24, 25, 19, 21, 26, 27, 27, 26, 27, 24, 21, 21, 26, 26, 28, 27, 27, 27,
    20, 24, 20, 21, 22, 21, 21, 23, 22, 22, 25, 25, 24, 24, 26, 23, 26, 27, 26, 26, 27, 27, 27, 27, 27, 28, 27, 27, 27, 27, 27, 26,
    30,
];
const LONGEST_BITS: usize = 30;
const SHORTEST_BITS: usize = 5;
const END_OF_STRING: u16 = 256;

/// For each code length: the first code beyond it, left-aligned in 32 bits, and where its symbols start.
struct Tables {
    end: [u64; LONGEST_BITS + 1],
    first: [u32; LONGEST_BITS + 1],
    offset: [u16; LONGEST_BITS + 1],
    symbols: Vec<u16>,
}

static TABLES: LazyLock<Tables> = LazyLock::new(|| {
    let mut tables = Tables {
        end: [0; LONGEST_BITS + 1],
        first: [0; LONGEST_BITS + 1],
        offset: [0; LONGEST_BITS + 1],
        symbols: Vec::with_capacity(LENGTHS.len()),
    };
    let mut code = 0u64;
    for bits in 1..=LONGEST_BITS {
        tables.offset[bits] = u16::try_from(tables.symbols.len()).unwrap_or(u16::MAX);
        tables.first[bits] = u32::try_from(code << (32 - bits)).unwrap_or(u32::MAX);
        for (symbol, length) in (0u16..).zip(LENGTHS) {
            if usize::from(length) == bits {
                tables.symbols.push(symbol);
                code += 1;
            }
        }
        tables.end[bits] = code << (32 - bits);
        code <<= 1;
    }
    tables
});

/// The bytes are not a Huffman-coded string: padding longer than 7 bits or not of ones, or the end symbol inside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct BadCode;

/// Decodes a Huffman-coded string onto `out`.
pub(super) fn decode(input: &[u8], out: &mut Vec<u8>) -> Result<(), BadCode> {
    let tables = &*TABLES;
    // `window` holds the next `held` bits, left-aligned.
    let (mut window, mut held, mut rest) = (0u64, 0usize, input.iter());
    loop {
        while held <= 32 {
            let Some(byte) = rest.next() else { break };
            window |= u64::from(*byte) << (56 - held);
            held += 8;
        }
        let top = u32::try_from(window >> 32).map_err(|_| BadCode)?;
        let Some(bits) =
            (SHORTEST_BITS..=LONGEST_BITS).find(|bits| u64::from(top) < tables.end[*bits])
        else {
            return padding(window, held);
        };
        if bits > held {
            return padding(window, held);
        }
        let rank = (top - tables.first[bits]) >> (32 - bits);
        let symbol = tables.symbols[usize::from(tables.offset[bits]) + rank as usize];
        if symbol == END_OF_STRING {
            return Err(BadCode);
        }
        out.push(u8::try_from(symbol).map_err(|_| BadCode)?);
        window <<= bits;
        held -= bits;
    }
}

/// RFC 7541 §5.2: what is left is shorter than a byte and all ones.
fn padding(window: u64, held: usize) -> Result<(), BadCode> {
    let ones = !(u64::MAX >> held);
    if held < 8 && (held == 0 || window == ones) { Ok(()) } else { Err(BadCode) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decoded(hex: &str) -> Result<String, BadCode> {
        let bytes: Vec<u8> = (0..hex.len() / 2)
            .map(|i| u8::from_str_radix(&hex[2 * i..2 * i + 2], 16).unwrap())
            .collect();
        let mut out = Vec::new();
        decode(&bytes, &mut out).map(|()| String::from_utf8(out).unwrap())
    }

    #[test]
    fn the_lengths_are_a_complete_code() {
        let sum: u64 = LENGTHS.iter().map(|l| 1u64 << (LONGEST_BITS - usize::from(*l))).sum();
        assert_eq!(sum, 1 << LONGEST_BITS);
    }

    #[test]
    fn the_examples_of_rfc_7541_appendix_c_decode() {
        assert_eq!(decoded("f1e3c2e5f23a6ba0ab90f4ff").unwrap(), "www.example.com");
        assert_eq!(decoded("a8eb10649cbf").unwrap(), "no-cache");
        assert_eq!(decoded("25a849e95ba97d7f").unwrap(), "custom-key");
        assert_eq!(
            decoded("d07abe941054d444a8200595040b8166e082a62d1bff").unwrap(),
            "Mon, 21 Oct 2013 20:13:21 GMT"
        );
        assert_eq!(
            decoded("9d29ad171863c78f0b97c8e9ae82ae43d3").unwrap(),
            "https://www.example.com"
        );
        assert_eq!(
            decoded("94e7821dd7f2e6c7b335dfdfcd5b3960d5af27087f3672c1ab270fb5291f9587316065c003ed4ee5b1063d5007").unwrap(),
            "foo=ASDJKHQKBZXOQWEOPIUAXQWEOIU; max-age=3600; version=1"
        );
    }

    #[test]
    fn bad_padding_and_the_end_symbol_are_refused() {
        assert_eq!(decoded("ff"), Err(BadCode), "eight bits of padding");
        assert_eq!(decoded("1e"), Err(BadCode), "padding of zeroes");
        assert_eq!(decoded("ffffffff"), Err(BadCode), "the end symbol");
        assert_eq!(decoded("").unwrap(), "");
    }
}
