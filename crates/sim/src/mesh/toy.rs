//! Certificates and signatures without cryptography: as long as real ones, and as hard to forge for whoever keeps to the rules of
//! the simulation. Equal cards are one card in memory, however many nodes know it.

use std::{
    collections::HashMap,
    hash::{DefaultHasher, Hash as _, Hasher as _},
    sync::Arc,
};

use base::{NodeName, RegionName};
use membership::{Card, Disbelief, Judge, Judged, NodeId};
use parking_lot::RwLock;
use prost::Message as _;
use proto::isobar::mesh::v1::SignedCard;

/// What a chain of two certificates takes.
const CHAIN_BYTES: usize = 1_000;
/// ECDSA on P-256, DER.
const SIGNATURE_BYTES: usize = 71;
const SCHEME: u32 = 0x0403;
/// Beyond so many, cards nobody knows any more are dropped.
const CARDS_MAX: usize = 200_000;

/// The judge of one node, which shares what it has judged with all others.
#[derive(Clone, Debug)]
pub(super) struct Toy {
    certificate: Arc<Vec<u8>>,
    key: u64,
    shared: Arc<RwLock<Shared>>,
}

#[derive(Debug, Default)]
struct Shared {
    /// What was judged, by its bytes. Only looked up, never walked.
    cards: HashMap<Arc<[u8]>, Arc<Card>>,
}

impl Toy {
    /// The judge of a node; `of` is one of the same world, if there is one already.
    pub(super) fn new(
        seed: u64,
        of: Option<&Self>,
        index: u32,
        node: &NodeName,
        region: &RegionName,
    ) -> Self {
        let shared = of.map(|of| Arc::clone(&of.shared)).unwrap_or_default();
        Self { certificate: Arc::new(certificate(index, node, region)), key: seed, shared }
    }

    fn mark(&self, certificate: &[u8], card: &[u8]) -> Vec<u8> {
        let mut hasher = DefaultHasher::new();
        (self.key, certificate, card).hash(&mut hasher);
        let mut mark = hasher.finish().to_be_bytes().to_vec();
        mark.resize(SIGNATURE_BYTES, 0x30);
        mark
    }
}

impl Judge for Toy {
    fn sign(&mut self, card: &[u8]) -> Result<Vec<u8>, String> {
        let certificate = self.certificate.to_vec();
        let signature = self.mark(&certificate, card);
        let certificates = vec![certificate];
        Ok(SignedCard { card: card.to_vec(), signature, scheme: SCHEME, certificates }
            .encode_to_vec())
    }

    fn judge(&mut self, signed: &[u8]) -> Result<Judged, Disbelief> {
        let signed = SignedCard::decode(signed).map_err(|error| error.to_string())?;
        let [certificate] = &*signed.certificates else {
            return Err("not one certificate".to_owned().into());
        };
        let (id, node, region) = read(certificate).ok_or_else(|| "not a certificate".to_owned())?;
        if signed.signature != self.mark(certificate, &signed.card) {
            return Err(Disbelief::Forged("the signature is not the owner's".to_owned()));
        }
        Ok(Judged { id, node, region, card: signed.card })
    }

    fn known(&self, signed: &[u8]) -> Option<Arc<Card>> {
        self.shared.read().cards.get(signed).cloned()
    }

    fn share(&mut self, card: Card) -> Arc<Card> {
        let cards = &mut self.shared.write().cards;
        if let Some(known) = cards.get(&card.signed) {
            return Arc::clone(known);
        }
        if cards.len() >= CARDS_MAX {
            cards.retain(|_, card| Arc::strong_count(card) > 1);
        }
        let card = Arc::new(card);
        cards.insert(Arc::clone(&card.signed), Arc::clone(&card));
        card
    }

    fn sha256(&self, bytes: &[u8]) -> [u8; 32] {
        let mut sum = [0; 32];
        for (i, part) in sum.chunks_exact_mut(8).enumerate() {
            part.copy_from_slice(&digest(i as u64, bytes).to_be_bytes());
        }
        sum
    }
}

fn digest(salt: u64, bytes: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    hasher.write_u64(salt);
    hasher.write(bytes);
    hasher.finish()
}

/// The id of a node: twelve bytes of hash, and its number, so that it is found at once.
pub(super) fn id(index: u32, node: &NodeName) -> NodeId {
    let mut id = [0; 16];
    let (front, back) = id.split_at_mut(12);
    front[..8].copy_from_slice(&digest(1, node.as_str().as_bytes()).to_be_bytes());
    front[8..].copy_from_slice(&digest(2, node.as_str().as_bytes()).to_be_bytes()[..4]);
    back.copy_from_slice(&index.to_be_bytes());
    NodeId(id)
}

/// The number of a node, if the id is one.
pub(super) fn index(id: NodeId) -> u32 {
    let [.., a, b, c, d] = id.0;
    u32::from_be_bytes([a, b, c, d])
}

fn certificate(index: u32, node: &NodeName, region: &RegionName) -> Vec<u8> {
    let text = format!("{index} {node} {region} ");
    let mut bytes = text.into_bytes();
    bytes.resize(CHAIN_BYTES.max(bytes.len()), b'.');
    bytes
}

fn read(certificate: &[u8]) -> Option<(NodeId, NodeName, RegionName)> {
    let text = std::str::from_utf8(certificate).ok()?;
    let mut words = text.split(' ');
    let number = words.next()?.parse().ok()?;
    let node: NodeName = words.next()?.parse().ok()?;
    Some((id(number, &node), node, words.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use membership::{Facts, encode_card};

    fn toy(index: u32, of: Option<&Toy>) -> Toy {
        Toy::new(7, of, index, &format!("n{index}").parse().unwrap(), &"r0".parse().unwrap())
    }

    fn facts() -> Facts {
        Facts {
            epoch: 3,
            bump: 1,
            peers: "n1:1".to_owned(),
            gossip: "n1:2".to_owned(),
            zone: None,
            descriptor: [9; 32],
            release: "1.0".to_owned(),
            protocol_max: 2,
        }
    }

    #[test]
    fn a_card_is_its_owners_and_the_same_for_all_who_judge_it() {
        let mut one = toy(1, None);
        let mut two = toy(2, Some(&one));
        let signed = one.sign(&encode_card(&facts())).unwrap();
        let Judged { id, node, region, card } = two.judge(&signed).unwrap();
        assert_eq!((index(id), node.as_str(), card), (1, "n1", encode_card(&facts())));
        assert!(two.known(&signed).is_none());
        let card = Card { id, node, region, facts: facts(), signed: signed.clone().into() };
        let shared = one.share(card.clone());
        assert!(Arc::ptr_eq(&shared, &two.share(card)));
        assert!(Arc::ptr_eq(&shared, &two.known(&signed).unwrap()));
        assert!(two.known(&signed[1..]).is_none());
    }

    #[test]
    fn a_changed_card_is_not_believed() {
        let mut one = toy(1, None);
        let signed = one.sign(&encode_card(&facts())).unwrap();
        let mut forged = SignedCard::decode(&*signed).unwrap();
        forged.card = encode_card(&Facts { epoch: 4, ..facts() });
        assert!(one.judge(&forged.encode_to_vec()).is_err());
        assert!(toy(1, None).judge(&signed).is_ok());
        let mut other = SignedCard::decode(&*signed).unwrap();
        other.certificates = vec![certificate(2, &"n2".parse().unwrap(), &"r0".parse().unwrap())];
        assert!(one.judge(&other.encode_to_vec()).is_err());
    }
}
