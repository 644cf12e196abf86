//! What a member of the mesh is called: `spiffe://<trust domain>/<role>/<region>/<name>`.
//!
//! SPIFFE leaves the path to us (SPIFFE ID standard §2.2). Every part is a type that only holds well-formed text, so the
//! four fields can be put together freely and any two spellings of an id are two ids.

use std::{fmt, str::FromStr};

use aws_lc_rs::digest::{SHA256, digest};
use base::{NodeName, RegionName, TrustDomain};

use crate::IdentityError;

/// What every SPIFFE id begins with.
pub(crate) const SCHEME: &str = "spiffe://";
/// How much of a wrong text an error repeats.
const SHOWN_CHARS: usize = 120;

/// The id of a member of the mesh.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SpiffeId {
    /// The mesh.
    pub trust_domain: TrustDomain,
    /// What the member may do.
    pub role: Role,
    /// Where it is.
    pub region: RegionName,
    /// Which one it is.
    pub name: NodeName,
}

/// What a member of the mesh may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    /// Relays calls and is believed about its own engines.
    Node,
    /// Issues certificates to others.
    Authority,
    /// Makes calls.
    Client,
    /// Changes and inspects the mesh.
    Operator,
}

impl Role {
    /// The role as it is written in an id.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Node => "node",
            Self::Authority => "authority",
            Self::Client => "client",
            Self::Operator => "operator",
        }
    }

    fn parse(text: &str) -> Option<Self> {
        let all = [Self::Node, Self::Authority, Self::Client, Self::Operator];
        all.into_iter().find(|role| role.as_str() == text)
    }
}

impl SpiffeId {
    /// What members call it among themselves: the first 16 bytes of the SHA-256 of its text.
    #[must_use]
    pub fn digest(&self) -> [u8; 16] {
        let hash = digest(&SHA256, self.to_string().as_bytes());
        let mut short = [0; 16];
        short.iter_mut().zip(hash.as_ref()).for_each(|(to, from)| *to = *from);
        short
    }
}

impl FromStr for SpiffeId {
    type Err = IdentityError;

    fn from_str(text: &str) -> Result<Self, IdentityError> {
        let wrong = |reason: String| IdentityError::NotAnId { text: shortened(text), reason };
        let Some(rest) = text.strip_prefix(SCHEME) else {
            return Err(wrong(format!("it does not begin with {SCHEME}")));
        };
        let mut parts = rest.split('/');
        let (Some(trust_domain), Some(role), Some(region), Some(name), None) =
            (parts.next(), parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(wrong("it does not have exactly four parts".into()));
        };
        Ok(Self {
            trust_domain: trust_domain
                .parse()
                .map_err(|e: base::NameError| wrong(e.to_string()))?,
            role: Role::parse(role)
                .ok_or_else(|| wrong(format!("`{}` is not a role", shortened(role))))?,
            region: region.parse().map_err(|e: base::NameError| wrong(e.to_string()))?,
            name: name.parse().map_err(|e: base::NameError| wrong(e.to_string()))?,
        })
    }
}

impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { trust_domain, role, region, name } = self;
        write!(f, "{SCHEME}{trust_domain}/{role}/{region}/{name}")
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The id of a whole mesh, which its CA's certificate carries: no path (SPIFFE ID standard §2.3).
pub(crate) fn mesh_uri(trust_domain: &TrustDomain) -> String {
    format!("{SCHEME}{trust_domain}")
}

/// The mesh that [`mesh_uri`] names.
pub(crate) fn parse_mesh_uri(text: &str) -> Option<TrustDomain> {
    text.strip_prefix(SCHEME)?.parse().ok()
}

fn shortened(text: &str) -> String {
    match text.char_indices().nth(SHOWN_CHARS) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.into(),
    }
}

#[cfg(test)]
mod tests {
    use data_encoding::HEXLOWER;

    use super::*;

    #[test]
    fn ids_have_one_spelling() {
        for good in [
            "spiffe://mesh.example/node/eu-west/b",
            "spiffe://a/authority/r/n",
            "spiffe://mesh_1.internal/client/r-1/n-1",
            "spiffe://m/operator/0/0",
        ] {
            assert_eq!(good.parse::<SpiffeId>().unwrap().to_string(), good);
        }
    }

    #[test]
    fn a_digest_is_the_front_of_the_sha_256_of_the_text() {
        let id: SpiffeId = "spiffe://mesh.example/node/eu-west/b".parse().unwrap();
        let hash = HEXLOWER.encode(&id.digest());
        assert_eq!(hash, "8da8ff1df8f9da66298e42af95884aee");
    }

    #[test]
    fn anything_else_is_refused_with_the_part_that_is_wrong() {
        for (bad, reason) in [
            ("", "begin with spiffe://"),
            ("https://mesh.example/node/eu/b", "begin with spiffe://"),
            ("SPIFFE://mesh.example/node/eu/b", "begin with spiffe://"),
            (" spiffe://mesh.example/node/eu/b", "begin with spiffe://"),
            ("spiffe://mesh.example", "four parts"),
            ("spiffe://mesh.example/node/eu", "four parts"),
            ("spiffe://mesh.example/node/eu/b/", "four parts"),
            ("spiffe://mesh.example/node/eu/b/c", "four parts"),
            ("spiffe:///node/eu/b", "trust domain"),
            ("spiffe://Mesh.example/node/eu/b", "trust domain"),
            ("spiffe://mesh.example:8443/node/eu/b", "trust domain"),
            ("spiffe://me@mesh.example/node/eu/b", "trust domain"),
            ("spiffe://mesh.example/Node/eu/b", "not a role"),
            ("spiffe://mesh.example//eu/b", "not a role"),
            ("spiffe://mesh.example/server/eu/b", "not a role"),
            ("spiffe://mesh.example/node//b", "region"),
            ("spiffe://mesh.example/node/../b", "region"),
            ("spiffe://mesh.example/node/%65u/b", "region"),
            ("spiffe://mesh.example/node/eu/b?x", "node name"),
            ("spiffe://mesh.example/node/eu/b#x", "node name"),
            ("spiffe://mesh.example/node/eu/b ", "node name"),
        ] {
            let error = bad.parse::<SpiffeId>().unwrap_err().to_string();
            assert!(error.contains(reason), "{bad}: {error}");
        }
    }

    #[test]
    fn an_error_repeats_a_bounded_part_of_the_text() {
        for long in ["ü".repeat(100_000), format!("spiffe://m/{}/r/n", "x".repeat(100_000))] {
            let error = long.parse::<SpiffeId>().unwrap_err();
            assert!(error.to_string().len() < 1_000);
        }
    }
}
