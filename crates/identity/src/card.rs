//! Cards: what a node says of itself under the signature of its certificate, so that anybody may hand it on.
//!
//! The certificates travel with the card and are judged by whoever reads it, at that moment, as in a handshake: a card is good
//! for as long as its certificate is, whatever its owner renewed since. What is on a card is not known here.

use std::time::SystemTime;

use prost::Message as _;
use proto::isobar::mesh::v1 as wire;
use rustls::{SignatureScheme, pki_types::CertificateDer};
use webpki::EndEntityCert;

use crate::{
    CertificateSummary, Identity, IdentityError, Role, SpiffeId,
    certificate::{Side, peer_id, unix_time, verify_chain},
    tls,
};

/// What is signed begins with this, so that the signature is good for nothing else.
const CONTEXT: &[u8] = b"isobar card\0";
/// Certificates of one card: its owner's, its issuer's, and one between that and a root.
const CHAIN_MAX: usize = 3;
/// Longest signed card that is read.
const BYTES_MAX: usize = 12 << 10;
/// What a card may be signed with: the schemes of TLS 1.3 that are in use.
const SCHEMES: [SignatureScheme; 6] = [
    SignatureScheme::ECDSA_NISTP256_SHA256,
    SignatureScheme::ECDSA_NISTP384_SHA384,
    SignatureScheme::ED25519,
    SignatureScheme::RSA_PSS_SHA256,
    SignatureScheme::RSA_PSS_SHA384,
    SignatureScheme::RSA_PSS_SHA512,
];

impl Identity {
    /// Signs a card with the certificate of the moment; the result is a `SignedCard`, encoded.
    ///
    /// # Errors
    /// The key cannot sign, or more certificates lead to a root than a card carries.
    pub fn sign_card(&self, card: &[u8]) -> Result<Vec<u8>, IdentityError> {
        let current = self.current();
        // Whoever judges it has roots of its own.
        let is_root = |one: &&CertificateDer<'_>| current.trusted().contains(one);
        let chain: Vec<_> = current.certified.cert.iter().filter(|one| !is_root(one)).collect();
        if chain.len() > CHAIN_MAX {
            return Err(wrong(format!(
                "{} certificates lead from this node to a root, and a card carries {CHAIN_MAX}",
                chain.len()
            )));
        }
        let signer = current.certified.key.choose_scheme(&SCHEMES);
        let signer = signer.ok_or_else(|| wrong("no scheme fits the key of this node"))?;
        let signed = wire::SignedCard {
            card: card.to_vec(),
            signature: signer.sign(&message(card))?,
            scheme: u16::from(signer.scheme()).into(),
            certificates: chain.into_iter().map(|one| one.to_vec()).collect(),
        };
        Ok(signed.encode_to_vec())
    }

    /// Judges a `SignedCard`, encoded, at the moment `now`: whose it is, and the card.
    ///
    /// # Errors
    /// It is damaged, or not signed by a node of this mesh whose certificate is good and was not revoked;
    /// [`IdentityError::ForgedCard`] where there is such a certificate, and only the signature is not its own.
    pub fn judge_card(
        &self,
        signed: &[u8],
        now: SystemTime,
    ) -> Result<(SpiffeId, Vec<u8>), IdentityError> {
        if signed.len() > BYTES_MAX {
            return Err(wrong(format!("it has {} bytes, more than {BYTES_MAX}", signed.len())));
        }
        let signed = wire::SignedCard::decode(signed).map_err(|error| wrong(error.to_string()))?;
        if signed.certificates.len() > CHAIN_MAX {
            return Err(wrong(format!("it carries more than {CHAIN_MAX} certificates")));
        }
        let chain = signed.certificates.into_iter().map(CertificateDer::from);
        let chain: Vec<CertificateDer<'static>> = chain.collect();
        let (leaf, intermediates) = chain.split_first().ok_or(IdentityError::NoPeerCertificate)?;
        let algorithms = tls::provider().signature_verification_algorithms;
        let time = unix_time(now);
        verify_chain(leaf, intermediates, &self.roots(), &algorithms, Side::Client, time)
            .map_err(|error| wrong(format!("this mesh does not vouch for its owner: {error}")))?;
        let owner = self.judge(peer_id(&chain)?, CertificateSummary::of(leaf)?.from, Role::Node)?;
        verify(leaf, &signed.card, &signed.signature, signed.scheme)?;
        Ok((owner, signed.card))
    }
}

/// Whether the signature is that of the certificate's key over the card.
fn verify(
    leaf: &CertificateDer<'_>,
    card: &[u8],
    signature: &[u8],
    scheme: u32,
) -> Result<(), IdentityError> {
    let known = SCHEMES.into_iter().find(|known| u32::from(u16::from(*known)) == scheme);
    let mapping = tls::provider().signature_verification_algorithms.mapping;
    // As in TLS 1.3, where each scheme stands for one algorithm: the first of those of TLS 1.2 (RFC 8446 §4.2.3).
    let algorithm = known
        .and_then(|known| mapping.iter().find(|(scheme, _)| *scheme == known))
        .and_then(|(_, algorithms)| algorithms.first())
        .ok_or_else(|| wrong(format!("nobody signs with the scheme {scheme:#06x}")))?;
    let leaf = EndEntityCert::try_from(leaf).map_err(|error| wrong(error.to_string()))?;
    leaf.verify_signature(*algorithm, &message(card), signature)
        .map_err(|_| IdentityError::ForgedCard)
}

fn message(card: &[u8]) -> Vec<u8> {
    [CONTEXT, card].concat()
}

fn wrong(why: impl Into<String>) -> IdentityError {
    IdentityError::Card(why.into())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use base::clock;

    use super::*;
    use crate::{Authority, CertificateRequest, NodeIdentity, authority::make_request};

    const HOUR: Duration = Duration::from_secs(3600);

    /// An authority in a directory of its own.
    struct Mesh(tempfile::TempDir);

    impl Mesh {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let domain = "mesh.test".parse().unwrap();
            Authority::init(dir.path(), &domain, HOUR, clock::wall()).unwrap();
            Self(dir)
        }

        fn authority(&self) -> Authority {
            Authority::open(self.0.path(), clock::wall()).unwrap()
        }

        fn own(&self, name: &str) -> NodeIdentity {
            let (authority, now) = (self.authority(), clock::wall());
            let request = CertificateRequest::new().unwrap();
            let id = format!("spiffe://mesh.test/node/eu/{name}").parse().unwrap();
            let chain = authority.sign(&id, request.csr(), &[], now).unwrap();
            let key = request.into_key();
            NodeIdentity::issued(self.0.path(), chain, key, authority.roots(), now).unwrap()
        }

        fn node(&self, name: &str) -> Identity {
            Identity::new(self.own(name))
        }

        /// Signed with the certificate of another role.
        fn operator(&self) -> Identity {
            let (authority, node) = (self.authority(), self.own("o"));
            let id = "spiffe://mesh.test/operator/eu/o".parse().unwrap();
            let csr = make_request(&node.key).unwrap();
            let chain = authority.sign(&id, &csr, &[], clock::wall()).unwrap();
            Identity::new(node.showing(chain))
        }
    }

    fn refused(judge: &Identity, signed: &[u8]) -> String {
        judge.judge_card(signed, clock::wall()).unwrap_err().to_string()
    }

    #[test]
    fn a_card_is_its_owners_whoever_hands_it_on() {
        let mesh = Mesh::new();
        let (a, b) = (mesh.node("a"), mesh.node("b"));
        let signed = a.sign_card(b"where I am").unwrap();
        let (owner, card) = b.judge_card(&signed, clock::wall()).unwrap();
        assert_eq!((&owner, card.as_slice()), (a.id(), &b"where I am"[..]));
        assert!(signed.len() < 2_000, "{} bytes", signed.len());
        // Renewing a certificate takes nothing back.
        a.replace(mesh.own("a")).unwrap();
        assert!(b.judge_card(&signed, clock::wall()).is_ok());
        assert!(b.judge_card(&a.sign_card(b"here").unwrap(), clock::wall()).is_ok());
    }

    #[test]
    fn a_card_that_was_altered_is_nobodys() {
        let mesh = Mesh::new();
        let (a, b) = (mesh.node("a"), mesh.node("b"));
        let good = a.sign_card(b"where I am").unwrap();
        let altered = |change: &dyn Fn(&mut wire::SignedCard)| {
            let mut card = wire::SignedCard::decode(&*good).unwrap();
            change(&mut card);
            refused(&b, &card.encode_to_vec())
        };
        let of_b = wire::SignedCard::decode(&*b.sign_card(b"where I am").unwrap()).unwrap();
        for (said, want) in [
            (altered(&|card| card.card[0] ^= 1), "does not fit"),
            (altered(&|card| card.signature[9] ^= 1), "does not fit"),
            (altered(&|card| card.signature.clear()), "does not fit"),
            (altered(&|card| card.certificates = of_b.certificates.clone()), "does not fit"),
            (altered(&|card| card.scheme = 0x0503), "does not fit"),
            (altered(&|card| card.scheme = 0x0401), "scheme 0x0401"),
            (altered(&|card| card.scheme = 1 << 20), "scheme 0x100000"),
            (altered(&|card| card.certificates.clear()), "no certificate"),
            (altered(&|card| card.certificates = vec![vec![1]; 3]), "does not vouch"),
            (altered(&|card| card.certificates = vec![vec![1]; 4]), "more than 3"),
            (refused(&b, &[0xff; 40]), "card"),
            (refused(&b, &vec![0; 20_000]), "20000 bytes"),
        ] {
            assert!(said.contains(want), "{said}");
        }
    }

    #[test]
    fn a_forged_card_is_told_from_one_nobody_vouches_for() {
        let (mesh, foreign) = (Mesh::new(), Mesh::new());
        let (a, b) = (mesh.node("a"), mesh.node("b"));
        for (signer, is_forged) in [(&a, true), (&foreign.node("a"), false)] {
            let mut card = wire::SignedCard::decode(&*signer.sign_card(b"x").unwrap()).unwrap();
            card.card = b"y".to_vec();
            let error = b.judge_card(&card.encode_to_vec(), clock::wall()).unwrap_err();
            assert_eq!(matches!(error, IdentityError::ForgedCard), is_forged, "{error}");
        }
    }

    #[test]
    fn only_nodes_of_this_mesh_have_cards() {
        let (mesh, foreign) = (Mesh::new(), Mesh::new());
        let judge = mesh.node("b");
        let said = refused(&judge, &foreign.node("a").sign_card(b"x").unwrap());
        assert!(said.contains("does not vouch"), "{said}");
        let said = refused(&judge, &mesh.operator().sign_card(b"x").unwrap());
        assert!(said.contains("is not a node"), "{said}");
    }

    #[test]
    fn a_card_ends_with_its_certificate_or_when_that_is_revoked() {
        let mesh = Mesh::new();
        let (a, b) = (mesh.node("a"), mesh.node("b"));
        let signed = a.sign_card(b"x").unwrap();
        let late = clock::wall() + 2 * HOUR;
        let said = b.judge_card(&signed, late).unwrap_err().to_string();
        assert!(said.contains("does not vouch"), "{said}");
        mesh.authority().revoke(a.id(), clock::wall()).unwrap();
        b.revoke(&mesh.authority().revoked().unwrap(), clock::wall());
        let said = refused(&b, &signed);
        assert!(said.contains("was revoked"), "{said}");
    }

    #[test]
    fn no_bytes_panic() {
        let mesh = Mesh::new();
        let (a, b) = (mesh.node("a"), mesh.node("b"));
        let good = a.sign_card(b"x").unwrap();
        for at in (0..good.len()).step_by(3) {
            let mut bytes = good.clone();
            bytes[at] ^= 0x55;
            drop(b.judge_card(&bytes, clock::wall()));
            drop(b.judge_card(&good[..at], clock::wall()));
        }
    }
}
