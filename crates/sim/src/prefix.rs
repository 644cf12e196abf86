//! How much of a prompt has been seen before? A cache of prefixes in blocks, as vLLM keeps one.
//!
//! A prompt is cut into tokens at white space, which is crude and quite enough: prompts that share a beginning share
//! tokens. Blocks of [`BLOCK_TOKENS`] tokens are hashed as a chain, so that a block stands for all that is before it,
//! and the least recently used blocks go first. Source: vLLM, "Automatic Prefix Caching" (design document).
//! Deliberately absent: the tokens of answers.

use lru::LruCache;

use crate::words::hash;

/// Tokens of a block. What is left of a prompt after its last full block is never cached.
pub(crate) const BLOCK_TOKENS: u32 = 16;

/// A prompt, cut and hashed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Prompt {
    tokens: u32,
    /// Each stands for its block and all before it.
    blocks: Vec<u64>,
}

impl Prompt {
    /// Cuts and hashes a text.
    #[must_use]
    pub(crate) fn new(text: &str) -> Self {
        let (mut prompt, mut chain) = (Self::default(), 0);
        for token in text.split_ascii_whitespace() {
            chain = hash(chain, token.as_bytes());
            prompt.tokens = prompt.tokens.saturating_add(1);
            if prompt.tokens.is_multiple_of(BLOCK_TOKENS) {
                prompt.blocks.push(chain);
            }
        }
        prompt
    }

    /// How many tokens it has.
    #[must_use]
    pub(crate) fn tokens(&self) -> u32 {
        self.tokens
    }

    /// Steps its prefill takes when `cached` of its tokens need none and a step takes `tokens_per_step`: at least 1,
    /// because the last token is computed anew even where all are cached. The last of them yields the first token.
    #[must_use]
    pub(crate) fn prefill_steps(&self, cached: u32, tokens_per_step: u32) -> u32 {
        self.tokens.saturating_sub(cached).div_ceil(tokens_per_step.max(1)).max(1)
    }
}

/// Prefixes seen before, in a bounded number of blocks.
#[derive(Debug)]
pub(crate) struct PrefixCache {
    blocks: LruCache<u64, ()>,
    capacity: usize,
}

impl PrefixCache {
    /// An empty cache of at most `capacity` blocks; with 0 it never holds anything.
    #[must_use]
    pub(crate) fn new(capacity: usize) -> Self {
        // Without a bound of its own, which would be allocated up front: `insert` keeps it.
        Self { blocks: LruCache::unbounded(), capacity }
    }

    /// How many leading tokens of a prompt are cached: whole blocks.
    #[must_use]
    pub(crate) fn cached_tokens(&self, prompt: &Prompt) -> u32 {
        let cached = prompt.blocks.iter().take_while(|block| self.blocks.contains(*block));
        cached.fold(0, |tokens, _| tokens + BLOCK_TOKENS)
    }

    /// Takes in a prompt, and drops what was used least recently.
    pub(crate) fn insert(&mut self, prompt: &Prompt) {
        // The last block first: a beginning, which more prompts share, then outlives its end.
        for block in prompt.blocks.iter().take(self.capacity).rev() {
            self.blocks.put(*block, ());
            if self.blocks.len() > self.capacity {
                self.blocks.pop_lru();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `count` tokens that begin with `name`.
    fn prompt(name: &str, count: usize) -> Prompt {
        Prompt::new(&(0..count).map(|n| format!("{name}{n} ")).collect::<String>())
    }

    #[test]
    fn tokens_are_words() {
        assert_eq!(Prompt::new("").tokens(), 0);
        assert_eq!(Prompt::new(" one\ttwo \n three").tokens(), 3);
    }

    #[test]
    fn a_prompt_is_cached_in_whole_blocks_once_it_was_inserted() {
        let mut cache = PrefixCache::new(8);
        let first = prompt("a", 40);
        assert_eq!(cache.cached_tokens(&first), 0);
        cache.insert(&first);
        assert_eq!(cache.cached_tokens(&first), 32);
        assert_eq!(cache.cached_tokens(&prompt("a", 500)), 32);
        assert_eq!(cache.cached_tokens(&prompt("a", 31)), 16);
        assert_eq!(cache.cached_tokens(&prompt("a", 15)), 0);
    }

    #[test]
    fn the_same_words_after_another_beginning_are_not_cached() {
        let mut cache = PrefixCache::new(8);
        let words = "w ".repeat(16);
        cache.insert(&Prompt::new(&words));
        assert_eq!(cache.cached_tokens(&Prompt::new(&format!("{}{words}", "v ".repeat(16)))), 0);
    }

    #[test]
    fn the_least_recently_used_blocks_go_first() {
        let mut cache = PrefixCache::new(4);
        let (a, b, c) = (prompt("a", 32), prompt("b", 32), prompt("c", 16));
        cache.insert(&a);
        cache.insert(&b);
        cache.insert(&a);
        cache.insert(&c);
        assert_eq!(cache.blocks.len(), 4);
        let cached = [&a, &b, &c].map(|prompt| cache.cached_tokens(prompt));
        assert_eq!(cached, [32, 16, 16], "the end of b made room");
    }

    #[test]
    fn of_a_prompt_longer_than_the_cache_the_beginning_stays() {
        let mut cache = PrefixCache::new(2);
        let long = prompt("a", 160);
        cache.insert(&long);
        assert_eq!((cache.blocks.len(), cache.cached_tokens(&long)), (2, 32));
    }

    #[test]
    fn a_cache_without_blocks_holds_nothing() {
        let mut cache = PrefixCache::new(0);
        cache.insert(&prompt("a", 160));
        assert!(cache.blocks.is_empty());
    }

    #[test]
    fn prefill_takes_a_step_per_so_many_uncached_tokens_and_at_least_one() {
        let long = prompt("a", 600);
        let steps = [0, 88, 344, 592, 600].map(|cached| long.prefill_steps(cached, 256));
        assert_eq!(steps, [3, 2, 1, 1, 1]);
        assert_eq!(Prompt::new("").prefill_steps(0, 256), 1);
        assert_eq!(long.prefill_steps(0, 0), 600, "no tokens per step count as one");
    }
}
