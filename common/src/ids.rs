//! Names of things, as types: a node's id is never mistaken for a cluster's name, and a name that exists is well formed.

use std::{fmt, str::FromStr};

use rand::RngExt;
use serde::{Deserialize, Serialize};

/// Longest name accepted, in bytes; the limit of a DNS label, so a node can be named after its host.
const NAME_BYTES_MAX: usize = 63;

/// Why a name was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "'{name}' is not a valid name: use 1 to {NAME_BYTES_MAX} of a-z, A-Z, 0-9, '-', '_' and '.', beginning with a letter or digit"
)]
pub struct InvalidName {
    name: String,
}

fn check(name: &str) -> Result<(), InvalidName> {
    let well_formed = name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'));
    let begins_well = name.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric());
    if well_formed && begins_well && name.len() <= NAME_BYTES_MAX {
        return Ok(());
    }
    Err(InvalidName { name: name.chars().take(80).collect() })
}

macro_rules! name {
    ($(#[$doc:meta])* $type:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $type(String);

        impl $type {
            /// The name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $type {
            type Err = InvalidName;
            fn from_str(name: &str) -> Result<Self, InvalidName> {
                check(name).map(|()| Self(name.to_owned()))
            }
        }

        impl TryFrom<String> for $type {
            type Error = InvalidName;
            fn try_from(name: String) -> Result<Self, InvalidName> {
                check(&name).map(|()| Self(name))
            }
        }

        impl From<$type> for String {
            fn from(name: $type) -> String {
                name.0
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

name! {
    /// One inference node, unique within its cluster.
    NodeId
}
name! {
    /// One Tidegate cluster; several may share an etcd.
    ClusterName
}
name! {
    /// A place with a cheap local network, such as `onprem` or `cloud-a`.
    SiteName
}
name! {
    /// Which of two versions of a model a node serves, usually `blue` or `green`.
    Color
}

/// A short hash of all that a model's answers depend on at a node, beside the request: its files, the device class, what the configuration
/// says of answers. Nodes with the same one answer alike, to the byte.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Fingerprint(u64);

/// A text that is no fingerprint.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a fingerprint has 16 hexadecimal digits")]
pub struct InvalidFingerprint;

impl Fingerprint {
    /// Of a hash.
    pub fn new(hash: u64) -> Self {
        Self(hash)
    }
}

impl FromStr for Fingerprint {
    type Err = InvalidFingerprint;

    fn from_str(text: &str) -> Result<Self, InvalidFingerprint> {
        let is_plain = text.len() == 16 && text.bytes().all(|b| b.is_ascii_hexdigit());
        let hash = u64::from_str_radix(text, 16).ok().filter(|_| is_plain);
        hash.map(Self).ok_or(InvalidFingerprint)
    }
}

impl TryFrom<String> for Fingerprint {
    type Error = InvalidFingerprint;

    fn try_from(text: String) -> Result<Self, InvalidFingerprint> {
        text.parse()
    }
}

impl From<Fingerprint> for String {
    fn from(fingerprint: Fingerprint) -> Self {
        fingerprint.to_string()
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

/// A request's id, drawn at the edge and carried to the node in `x-request-id`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct RequestId(String);

impl RequestId {
    /// A new random id of 128 bits, in hexadecimal.
    pub fn random() -> Self {
        Self(format!("{:032x}", rand::rng().random::<u128>()))
    }

    /// The id of a request without one of its own whose way is traced: the trace's number.
    pub fn of_trace(trace: u128) -> Self {
        Self(format!("{trace:032x}"))
    }

    /// The client's own id when it is short and printable, else a new one.
    pub fn from_client(given: Option<&str>) -> Self {
        match given {
            Some(id) if check(id).is_ok() => Self(id.to_owned()),
            _ => Self::random(),
        }
    }

    /// The id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_one_dns_label_or_less_strict() {
        for good in ["n1", "edge-a.example", "GPU_7"] {
            assert_eq!(good.parse::<NodeId>().unwrap().as_str(), good);
        }
        for bad in ["", "-n", "a/b", "a b", "ü", &"x".repeat(64)] {
            assert!(bad.parse::<NodeId>().is_err(), "{bad:?} passed");
        }
    }

    #[test]
    fn a_fingerprint_reads_back_and_nothing_else_is_one() {
        for hash in [0, 1, u64::MAX] {
            let fingerprint = Fingerprint::new(hash);
            assert_eq!(fingerprint.to_string().parse(), Ok(fingerprint));
        }
        for bad in ["", "7", "+123456789abcdef", "0123456789abcdefg", "0123456789abcde "] {
            assert_eq!(bad.parse::<Fingerprint>(), Err(InvalidFingerprint), "{bad:?}");
        }
    }

    #[test]
    fn a_hostile_request_id_is_replaced() {
        assert_eq!(RequestId::from_client(Some("abc-1")).as_str(), "abc-1");
        assert_eq!(RequestId::from_client(Some("a\r\nx: y")).as_str().len(), 32);
        assert_ne!(RequestId::from_client(None), RequestId::from_client(None));
    }
}
