//! `tidegate check`: every problem of a configuration at once, each with its path and its fix.

use tidegate_common::config::RegistryConfig;
use tidegate_node::models::Store;

use crate::{
    exit::Failure,
    settings::{All, ConfigFile},
};

/// Check a configuration: all problems at once, each with its path and its fix
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Certificates, keys and key files that the configuration names are opened too, so run it on the machine it \
is for.\n\nExample:\n  tidegate check --config cluster.toml"
)]
pub(crate) struct Args {
    #[command(flatten)]
    file: ConfigFile,
}

pub(crate) fn run(args: &Args) -> Result<(), Failure> {
    let all = All::check(&args.file.read()?)?;
    let scheme = if all.balancer.uses_tls() { "https" } else { "http" };
    let listen: Vec<String> = all.balancer.listen_addresses().iter().map(|a| format!("{scheme}://{a}")).collect();
    println!("cluster   {}, {}", all.cluster.name, registry(&all.cluster.registry));
    println!("balancer  {}, admin http://{}", listen.join(", "), all.balancer.admin_address());
    let names: Vec<&str> = all.node.models.iter().map(|model| model.name.as_str()).collect();
    println!("node      {} at {}, model {}", all.node.id, all.node.address(), names.join(", "));
    let store = Store::open(&all.node.data_dir);
    for e in all.node.models.iter().filter_map(|model| store.locate(&model.model).err()) {
        println!("note      {e}");
    }
    println!("no problems");
    Ok(())
}

fn registry(registry: &RegistryConfig) -> String {
    match registry {
        RegistryConfig::Memory => "members known within one process (for `tidegate up`)".to_owned(),
        RegistryConfig::Static { nodes } => format!("{} nodes listed", nodes.len()),
        RegistryConfig::Etcd(etcd) => format!("members found in etcd at {}", etcd.endpoints.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use tidegate_common::config::Raw;

    use super::*;

    /// Their files do not exist here, so only what has no place in a configuration is looked for.
    #[test]
    fn samples_in_the_documentation_have_keys_that_exist() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let pages = std::fs::read_dir(root.join("docs")).unwrap().map(|entry| entry.unwrap().path());
        let mut count = 0;
        for page in pages.chain([root.join("README.md")]) {
            let text = std::fs::read_to_string(&page).unwrap();
            for sample in text.split("```toml\n").skip(1).filter_map(|rest| rest.split("```").next()) {
                let raw =
                    Raw::from_toml(sample, "sample").unwrap_or_else(|e| panic!("{}: {e}\n{sample}", page.display()));
                let problems = All::check(&raw).map_or_else(|problems| problems.0, |_| Vec::new());
                let unknown: Vec<_> = problems.iter().filter(|p| p.message.starts_with("unknown key")).collect();
                assert!(unknown.is_empty(), "{}: {unknown:?}\n{sample}", page.display());
                count += 1;
            }
        }
        assert!(count >= 5, "{count} samples");
    }

    #[test]
    fn every_sample_passes() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy/config");
        let mut count = 0;
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if let Err(e) = Raw::from_file(&path).and_then(|raw| All::check(&raw)) {
                panic!("{}: {e}", path.display());
            }
            count += 1;
        }
        assert!(count >= 3, "{count} samples");
    }
}
