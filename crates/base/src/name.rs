//! Names with one spelling: parsed once at the edge, never checked again.
//!
//! Node, region, zone and engine names are DNS labels (RFC 1123 §2.1) in lower case, because they become parts of
//! SPIFFE ids, host names, `via` pseudonyms and metric labels, and must mean the same in each of them.

use std::{borrow::Cow, fmt, str::FromStr};

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// Longest DNS label (RFC 1035 §2.3.4).
const LABEL_MAX_BYTES: usize = 63;
/// Longest SPIFFE trust domain (SPIFFE ID standard §2.1).
const TRUST_DOMAIN_MAX_BYTES: usize = 255;
/// Longest model name a node keeps; engines in the field stay below 200 bytes.
const MODEL_MAX_BYTES: usize = 512;

/// Why a text is not a name. The fault is with whoever wrote it; nothing has changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is not {what}: {rule}")]
pub struct NameError {
    text: String,
    what: &'static str,
    rule: &'static str,
}

impl NameError {
    fn new(text: &str, what: &'static str, rule: &'static str) -> Self {
        let mut shown: String = text.chars().take(LABEL_MAX_BYTES).collect();
        if shown.len() < text.len() {
            shown.push('…');
        }
        Self { text: shown, what, rule }
    }
}

const LABEL_RULE: &str =
    "write 1 to 63 characters of a-z, 0-9 and `-`, beginning and ending with a letter or digit";
const LABEL_PATTERN: &str = "^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$";
const DOMAIN_RULE: &str =
    "write 1 to 255 characters of a-z, 0-9, `-`, `_` and `.`, such as mesh.example";
const DOMAIN_PATTERN: &str = "^[a-z0-9_-]+(\\.[a-z0-9_-]+)*$";
const MODEL_RULE: &str = "write 1 to 512 bytes without control characters";
const MODEL_PATTERN: &str = "^[^\\x00-\\x1f\\x7f]+$";

fn is_label(text: &str) -> bool {
    let bytes = text.as_bytes();
    let alnum = |b: &u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    (1..=LABEL_MAX_BYTES).contains(&bytes.len())
        && bytes.iter().all(|b| alnum(b) || *b == b'-')
        && bytes.first().is_some_and(alnum)
        && bytes.last().is_some_and(alnum)
}

fn is_trust_domain(text: &str) -> bool {
    text.len() <= TRUST_DOMAIN_MAX_BYTES
        && text.split('.').all(|part| {
            !part.is_empty()
                && part
                    .bytes()
                    .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || b == b'_')
        })
}

fn is_model(text: &str) -> bool {
    (1..=MODEL_MAX_BYTES).contains(&text.len()) && !text.chars().any(char::is_control)
}

macro_rules! name {
    ($(#[$doc:meta])* $name:ident, $what:literal, $check:path, $rule:ident, $pattern:ident) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(std::sync::Arc<str>);

        impl $name {
            /// The name as text.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = NameError;

            fn from_str(text: &str) -> Result<Self, NameError> {
                if $check(text) {
                    Ok(Self(text.into()))
                } else {
                    Err(NameError::new(text, $what, $rule))
                }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Debug::fmt(&self.0, f)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                Cow::<'de, str>::deserialize(deserializer)?.parse().map_err(de::Error::custom)
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(&self.0)
            }
        }

        impl JsonSchema for $name {
            fn inline_schema() -> bool {
                true
            }

            fn schema_name() -> Cow<'static, str> {
                stringify!($name).into()
            }

            fn json_schema(_: &mut SchemaGenerator) -> Schema {
                json_schema!({ "type": "string", "pattern": $pattern })
            }
        }
    };
}

name!(
    /// A node: unique in the mesh.
    NodeName, "a node name", is_label, LABEL_RULE, LABEL_PATTERN
);
name!(
    /// A region: nodes of one region are a few milliseconds apart.
    RegionName, "a region name", is_label, LABEL_RULE, LABEL_PATTERN
);
name!(
    /// A zone inside a region: what fails together.
    ZoneName, "a zone name", is_label, LABEL_RULE, LABEL_PATTERN
);
name!(
    /// An engine (GPU server) behind a node: unique at that node.
    EngineName, "an engine name", is_label, LABEL_RULE, LABEL_PATTERN
);
name!(
    /// A tenant: on whose behalf a client calls.
    TenantName, "a tenant name", is_label, LABEL_RULE, LABEL_PATTERN
);
name!(
    /// The domain a mesh's certificates speak for (SPIFFE ID standard §2.1).
    TrustDomain, "a trust domain", is_trust_domain, DOMAIN_RULE, DOMAIN_PATTERN
);
name!(
    /// A model as the engines spell it.
    ModelName, "a model name", is_model, MODEL_RULE, MODEL_PATTERN
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_dns_labels_in_lower_case() {
        for good in ["a", "eu-1", "0", &"x".repeat(63)] {
            assert!(good.parse::<NodeName>().is_ok(), "{good}");
        }
        for bad in ["", "-a", "a-", "A", "a.b", "a/b", "ä", "a b", &"x".repeat(64)] {
            assert!(bad.parse::<NodeName>().is_err(), "{bad}");
        }
    }

    #[test]
    fn trust_domains_are_dotted() {
        for good in ["mesh.example", "a", "x_y.z-1"] {
            assert!(good.parse::<TrustDomain>().is_ok(), "{good}");
        }
        for bad in ["", ".", "a..b", "Mesh", "a/b", "spiffe://a", &"a".repeat(256)] {
            assert!(bad.parse::<TrustDomain>().is_err(), "{bad}");
        }
    }

    #[test]
    fn model_names_keep_their_punctuation() {
        assert!("meta-llama/Llama-3.1-8B:fp8@main".parse::<ModelName>().is_ok());
        assert!("a\nb".parse::<ModelName>().is_err());
    }

    #[test]
    fn an_error_shows_a_bounded_part_of_the_text() {
        let error = "X".repeat(100_000).parse::<NodeName>().unwrap_err();
        assert!(error.to_string().len() < 300);
    }
}
