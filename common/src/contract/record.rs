//! What the registry holds of a node. Load is never written there: it comes back with each health probe.

use serde::{Deserialize, Serialize};

use crate::ids::{ClusterName, Color, NodeId, SiteName};

/// Version of the record's form; readers skip records of a later one.
pub const RECORD_VERSION: u32 = 1;

/// One node, as `/tidegate/v1/{cluster}/nodes/{node_id}` holds it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeRecord {
    /// [`RECORD_VERSION`] when it was written.
    pub v: u32,
    /// The node's id.
    pub id: NodeId,
    /// `host:port` that balancers reach it by.
    pub address: String,
    /// Whether it speaks TLS there.
    #[serde(default)]
    pub tls: bool,
    /// The name in the API of the model that requests get which name none.
    pub model: String,
    /// All models that the node can serve now or on first use, by their names in the API; only `model` when empty.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub models: Vec<String>,
    /// Version of the model or its deployment.
    #[serde(default)]
    pub version: String,
    /// Blue or green.
    #[serde(default = "blue")]
    pub color: Color,
    /// Where it stands.
    #[serde(default = "local")]
    pub site: SiteName,
    /// Share in round-robin, 1 to 1000.
    #[serde(default = "one")]
    pub weight: u32,
}

impl NodeRecord {
    /// A record with defaults for all that is not given.
    pub fn new(id: NodeId, address: String, model: String) -> Self {
        Self {
            v: RECORD_VERSION,
            id,
            address,
            tls: false,
            model,
            models: Vec::new(),
            version: String::new(),
            color: blue(),
            site: local(),
            weight: one(),
        }
    }

    /// Names of the models that the node serves.
    pub fn models(&self) -> &[String] {
        if self.models.is_empty() { std::slice::from_ref(&self.model) } else { &self.models }
    }
}

/// Version of the form of [`KnownMembers`]; a later one is not read.
pub const KNOWN_MEMBERS_VERSION: u32 = 1;

/// The members that a balancer knew last, as it keeps them in a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KnownMembers {
    /// [`KNOWN_MEMBERS_VERSION`] when it was written.
    pub v: u32,
    /// Whose members they are.
    pub cluster: ClusterName,
    /// Their records, as the registry had them.
    pub nodes: Vec<NodeRecord>,
}

fn blue() -> Color {
    "blue".parse().expect("'blue' is a valid name")
}

fn local() -> SiteName {
    "local".parse().expect("'local' is a valid name")
}

fn one() -> u32 {
    1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_of_few_words_gets_defaults_and_a_later_field_is_no_fault() {
        let text = r#"{"v":1,"id":"n1","address":"127.0.0.1:1","model":"m","later":true}"#;
        let record: NodeRecord = serde_json::from_str(text).unwrap();
        assert_eq!(record, NodeRecord::new("n1".parse().unwrap(), "127.0.0.1:1".into(), "m".into()));
        assert_eq!(record.models(), ["m"]);
    }

    #[test]
    fn a_node_of_several_models_names_them_beside_the_one_that_earlier_releases_read() {
        let mut record = NodeRecord::new("n1".parse().unwrap(), "127.0.0.1:1".into(), "m".into());
        record.models = vec!["m".into(), "other".into()];
        let text = serde_json::to_string(&record).unwrap();
        assert!(text.contains(r#""model":"m","models":["m","other"]"#), "{text}");
        let back: NodeRecord = serde_json::from_str(&text).unwrap();
        assert_eq!(back.models(), ["m", "other"]);
    }
}
