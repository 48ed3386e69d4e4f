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

/// A request's id, drawn at the edge and carried to the node in `x-request-id`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct RequestId(String);

impl RequestId {
    /// A new random id of 128 bits, in hexadecimal.
    pub fn random() -> Self {
        Self(format!("{:032x}", rand::rng().random::<u128>()))
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
    fn a_hostile_request_id_is_replaced() {
        assert_eq!(RequestId::from_client(Some("abc-1")).as_str(), "abc-1");
        assert_eq!(RequestId::from_client(Some("a\r\nx: y")).as_str().len(), 32);
        assert_ne!(RequestId::from_client(None), RequestId::from_client(None));
    }
}
