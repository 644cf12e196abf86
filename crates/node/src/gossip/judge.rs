//! Cards as the machine of membership sees them, signed and judged with this node's identity.

use aws_lc_rs::digest::{SHA256, digest};
use base::clock;
use identity::{Identity, IdentityError, SpiffeId};
use membership::{Disbelief, Judge, Judged, NodeId, Peer};

/// Judges by the identity of the moment.
#[derive(Debug)]
pub(crate) struct NodeJudge(pub(crate) Identity);

impl Judge for NodeJudge {
    fn sign(&mut self, card: &[u8]) -> Result<Vec<u8>, String> {
        self.0.sign_card(card).map_err(|error| error.to_string())
    }

    fn judge(&mut self, signed: &[u8]) -> Result<Judged, Disbelief> {
        let judged = self.0.judge_card(signed, clock::wall());
        let (owner, card) = judged.map_err(|error| match error {
            IdentityError::ForgedCard => Disbelief::Forged(error.to_string()),
            _ => Disbelief::Doubtful(error.to_string()),
        })?;
        let Peer { id, node, region } = peer(&owner);
        Ok(Judged { id, node, region, card })
    }

    fn sha256(&self, bytes: &[u8]) -> [u8; 32] {
        let mut hash = [0; 32];
        hash.copy_from_slice(digest(&SHA256, bytes).as_ref());
        hash
    }
}

/// A member as membership calls it.
pub(crate) fn peer(id: &SpiffeId) -> Peer {
    Peer { id: node_id(id), node: id.name.clone(), region: id.region.clone() }
}

/// How members call a member among themselves.
pub(crate) fn node_id(id: &SpiffeId) -> NodeId {
    NodeId(id.digest())
}
