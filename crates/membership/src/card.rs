//! Cards: where a node is and what it is, in its own words and under its own signature.

use std::sync::Arc;

use base::{NodeName, RegionName, ZoneName};

use crate::{NodeId, Pair};

/// A card that somebody vouched for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Card {
    /// Whose it is, by its certificate.
    pub id: NodeId,
    /// The owner's name, by its certificate.
    pub node: NodeName,
    /// The owner's region, by its certificate.
    pub region: RegionName,
    /// What the owner says.
    pub facts: Facts,
    /// The card as it is handed on: a `SignedCard`, encoded.
    pub signed: Arc<[u8]>,
}

impl Card {
    /// The node as it stands on this card.
    #[must_use]
    pub fn pair(&self) -> Pair {
        Pair { id: self.id, epoch: self.facts.epoch, bump: self.facts.bump }
    }
}

/// What a node says on its card.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Facts {
    /// The process: greater after each start.
    pub epoch: u64,
    /// Counts up with every card of an epoch.
    pub bump: u16,
    /// Where its port for peers is reached, host and port.
    pub peers: String,
    /// Where its gossip port is reached, host and port.
    pub gossip: String,
    /// Its zone.
    pub zone: Option<ZoneName>,
    /// SHA-256 of its encoded descriptor.
    pub descriptor: [u8; 32],
    /// The release it runs, for people.
    pub release: String,
    /// Newest version of the protocol it speaks.
    pub protocol_max: u32,
}

/// Who signs this node's cards and judges those of others. Certificates are not known here.
pub trait Judge {
    /// Signs this node's card; the result is a `SignedCard`, encoded.
    ///
    /// # Errors
    /// Why it cannot be signed.
    fn sign(&mut self, card: &[u8]) -> Result<Vec<u8>, String>;

    /// Judges a `SignedCard`, encoded: whose it is by its certificates, and the `Card` they signed, encoded.
    ///
    /// # Errors
    /// Why it is not believed, and whether whoever hands it on must have known.
    fn judge(&mut self, signed: &[u8]) -> Result<Judged, Disbelief>;

    /// A card that was judged and kept before, where to judge it again would say the same.
    fn known(&self, signed: &[u8]) -> Option<Arc<Card>> {
        let _ = signed;
        None
    }

    /// Keeps a card that was judged. Where many machines live in one process, one copy does for all of them.
    fn share(&mut self, card: Card) -> Arc<Card> {
        Arc::new(card)
    }

    /// SHA-256, for descriptors.
    fn sha256(&self, bytes: &[u8]) -> [u8; 32];
}

/// Why a card is not believed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Disbelief {
    /// Its certificates are good, and its signature is not theirs: every node sees that, and hands no such card on.
    #[error("{0}")]
    Forged(String),
    /// Anything else. Others may see it otherwise: they may trust another authority, or know of other things.
    #[error("{0}")]
    Doubtful(String),
}

impl From<String> for Disbelief {
    fn from(why: String) -> Self {
        Self::Doubtful(why)
    }
}

/// A card whose signature and certificates are good.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Judged {
    /// Whose it is.
    pub id: NodeId,
    /// The owner's name.
    pub node: NodeName,
    /// The owner's region.
    pub region: RegionName,
    /// What the owner signed: a `Card`, encoded.
    pub card: Vec<u8>,
}
