//! The cards of other nodes on disk: a node that starts again finds the mesh although its seeds are gone.
//!
//! They are judged when they are read, like those that come from others: whoever can write there can make the node dial, and
//! nothing else. What is damaged is said and left behind.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use membership::CARD_BYTES_MAX;
use prost::Message as _;
use proto::isobar::mesh::v1::{Cards, SignedCard};

/// The file, in `node.state_dir`.
pub(crate) const KEPT: &str = "peers.pb";
/// Cards that are kept.
pub(super) const CARDS_MAX: usize = 256;

/// The signed cards that were kept; what cannot be read is left out.
pub(super) fn read(path: &Path) -> Vec<Vec<u8>> {
    match try_read(path) {
        Ok(cards) => cards,
        Err(why) => {
            tracing::warn!(why, path = %path.display(), "the cards of other nodes that were kept cannot be used; the seeds are asked");
            Vec::new()
        }
    }
}

fn try_read(path: &Path) -> Result<Vec<Vec<u8>>, String> {
    match fs::metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error.to_string()),
        Ok(found) if found.len() > (2 * CARDS_MAX * CARD_BYTES_MAX) as u64 => {
            return Err("the file is too long".to_owned());
        }
        Ok(_) => {}
    }
    let bytes = fs::read(path).map_err(|error| error.to_string())?;
    let kept = Cards::decode(bytes.as_slice()).map_err(|error| error.to_string())?;
    Ok(kept.cards.iter().take(CARDS_MAX).map(SignedCard::encode_to_vec).collect())
}

/// Keeps signed cards, in the place of those that were kept.
pub(super) fn write(path: PathBuf, cards: Vec<Vec<u8>>) {
    let cards = cards.iter().filter_map(|card| SignedCard::decode(card.as_slice()).ok());
    let kept = Cards { cards: cards.collect(), ..Cards::default() };
    if let Err(error) = identity::write_file(&path, &kept.encode_to_vec()) {
        tracing::warn!(%error, "the cards of other nodes cannot be kept: after a restart this node finds them through its seeds alone");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cards_are_kept_and_what_is_damaged_is_left() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(KEPT);
        assert!(read(&path).is_empty());
        let card = |n: u8| SignedCard { card: vec![n; 9], ..SignedCard::default() }.encode_to_vec();
        let cards = vec![card(1), card(2)];
        write(path.clone(), cards.clone());
        assert_eq!(read(&path), cards);
        for damage in [&b"\xff\xff"[..], &vec![0; 8 << 20]] {
            fs::write(&path, damage).unwrap();
            assert!(read(&path).is_empty());
        }
        write(dir.path().join("none/peers.pb"), cards);
    }
}
