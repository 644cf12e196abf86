//! Which text does a simulated model write? Words that follow from the prompt alone, so that anybody can check an answer.

/// Syllables of which words are made.
const SYLLABLES: [&str; 32] = [
    "ba", "be", "bo", "da", "de", "do", "fa", "fi", "ga", "go", "ka", "ki", "ko", "la", "le", "li",
    "lo", "ma", "mi", "mo", "na", "ne", "no", "pa", "ra", "ri", "sa", "so", "ta", "ti", "to", "va",
];

/// What a prompt makes a model write, word by word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Words(u64);

impl Words {
    /// The words that follow `prompt`.
    #[must_use]
    pub fn after(prompt: &str) -> Self {
        Self(hash(0, prompt.as_bytes()))
    }

    /// The token numbered `index` from 0: a word, with a space before it unless it is the first.
    #[must_use]
    pub fn token(self, index: u32) -> String {
        let bits = hash(self.0, &index.to_le_bytes());
        let syllables = 2 + (bits >> 60) % 2;
        let syllable = |n: u64| SYLLABLES[(bits >> (5 * n)) as usize % SYLLABLES.len()];
        let space = (index > 0).then_some(" ");
        space.into_iter().chain((0..syllables).map(syllable)).collect()
    }

    /// The first `count` tokens as one text.
    #[must_use]
    pub fn text(self, count: u32) -> String {
        (0..count).map(|index| self.token(index)).collect()
    }
}

/// FNV-1a with the finaliser of SplitMix64: the same on every machine and in every release, unlike `std`'s.
pub(crate) fn hash(seed: u64, bytes: &[u8]) -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325 ^ seed;
    for byte in bytes {
        hash = (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
    }
    hash = (hash ^ (hash >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    hash = (hash ^ (hash >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    hash ^ (hash >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_words_follow_from_the_prompt_alone() {
        let words = Words::after("a prompt");
        assert_eq!(words, Words::after("a prompt"));
        assert_ne!(words.text(8), Words::after("another").text(8));
        assert_eq!(words.text(3), words.token(0) + &words.token(1) + &words.token(2));
    }

    #[test]
    fn a_text_has_as_many_words_as_tokens() {
        let text = Words::after("").text(100);
        assert_eq!(text.split(' ').count(), 100);
        assert!(text.split(' ').all(|word| (4..=6).contains(&word.len())), "{text}");
    }
}
