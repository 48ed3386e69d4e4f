//! The configuration of a run: file, then environment, then flags, checked for the roles that run here.

use std::path::{Path, PathBuf};

use tidegate_balancer::BalancerConfig;
use tidegate_common::config::{ClusterConfig, FromValue, LogConfig, Problems, Raw, Reader};
use tidegate_node::NodeConfig;
use toml::Value;

/// `--config`, as all roles take it.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct ConfigFile {
    /// Configuration file (TOML); without it everything has its default
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
}

impl ConfigFile {
    /// The file with the environment over it.
    pub(crate) fn read(&self) -> Result<Raw, Problems> {
        let raw = match &self.config {
            Some(path) => Raw::from_file(path)?,
            None => Raw::empty(),
        };
        Ok(raw.with_env(environment()))
    }
}

/// Both roles, as `up` and `check` need them.
pub(crate) struct All {
    pub(crate) cluster: ClusterConfig,
    pub(crate) log: LogConfig,
    pub(crate) balancer: BalancerConfig,
    pub(crate) node: NodeConfig,
}

impl All {
    pub(crate) fn check(raw: &Raw) -> Result<Self, Problems> {
        raw.check(|r| Self {
            cluster: ClusterConfig::read(r),
            log: LogConfig::read(r),
            balancer: BalancerConfig::read(r),
            node: NodeConfig::read(r),
        })
    }
}

/// A section that stands in the file for another role. It is not looked into: its files may lie on other machines.
pub(crate) fn leave_to_others(root: &Reader<'_>, section: &str) {
    struct Anything;
    impl FromValue for Anything {
        fn from_value(_: &Value) -> Result<Self, String> {
            Ok(Self)
        }
    }
    root.get::<Anything>(section);
}

/// A path as a flag's text.
pub(crate) fn text_of(path: Option<&Path>) -> Option<String> {
    path.map(|path| path.display().to_string())
}

/// Variables that are not Unicode cannot be ours.
fn environment() -> impl Iterator<Item = (String, String)> {
    std::env::vars_os().filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
}
