//! How many slots of an engine are a node's own, where several nodes front it.
//!
//! All of them know who the others are and reckon the same, so nobody has to be asked. Each node has at least one slot: with
//! more nodes than slots there are a few calls too many, and the engine itself says that it is busy.

use std::num::NonZeroU32;

/// Which of several nodes a node is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Owner {
    /// Its place among them, from 0, in an order all of them know.
    pub place: u32,
    /// How many they are, itself included.
    pub of: NonZeroU32,
}

/// The share of `slots` that is `owner`'s: an equal one, and of what is left one more for each of the first.
#[must_use]
pub fn share(slots: NonZeroU32, owner: Owner) -> NonZeroU32 {
    let (whole, left) = (slots.get() / owner.of, slots.get() % owner.of);
    let own = whole + u32::from(owner.place < left);
    NonZeroU32::new(own).unwrap_or(NonZeroU32::MIN)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shares(slots: u32, of: u32) -> Vec<u32> {
        let (slots, of) = (NonZeroU32::new(slots).unwrap(), NonZeroU32::new(of).unwrap());
        (0..of.get()).map(|place| share(slots, Owner { place, of }).get()).collect()
    }

    #[test]
    fn shares_are_equal_and_the_first_have_what_is_left() {
        assert_eq!(shares(64, 1), [64]);
        assert_eq!(shares(64, 2), [32, 32]);
        assert_eq!(shares(8, 3), [3, 3, 2]);
        assert_eq!(shares(11, 4), [3, 3, 3, 2]);
    }

    #[test]
    fn shares_make_the_whole_whenever_everybody_can_have_one() {
        for slots in 1..200 {
            for of in 1..=slots.min(40) {
                assert_eq!(shares(slots, of).iter().sum::<u32>(), slots, "{slots} for {of}");
            }
        }
    }

    #[test]
    fn nobody_has_none() {
        assert_eq!(shares(2, 5), [1; 5]);
    }
}
