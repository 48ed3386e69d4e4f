//! `tidegate status`: the cluster as a running balancer sees it, in one table.

use std::{net::SocketAddr, time::Duration};

use tidegate_balancer::{
    BalancerConfig,
    admin::{MemberReport, Members, RegistryLink},
};

use tidegate_common::contract::{ModelHealth, ModelState};

use crate::{
    exit::Failure,
    private,
    settings::{self, ConfigFile},
};

const TIMEOUT: Duration = Duration::from_secs(5);

/// Show the running cluster: every node with its model, version, color, site, state and load
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Load is answers being written + requests waiting, and how much of the KV memory is in use.\n\n\
Example:\n  tidegate status --admin 127.0.0.1:18790"
)]
pub(crate) struct Args {
    /// Private listener of the balancer [default: balancer.admin.listen, or 127.0.0.1:18790]
    #[arg(long, value_name = "ADDR")]
    admin: Option<SocketAddr>,
    #[command(flatten)]
    file: ConfigFile,
}

pub(crate) fn run(args: &Args) -> Result<(), Failure> {
    let admin = match args.admin {
        Some(address) => address,
        None => configured(&args.file)?,
    };
    let members = private::runtime()?.block_on(ask(admin))?;
    print!("{}", table(&members));
    Ok(())
}

fn configured(file: &ConfigFile) -> Result<SocketAddr, Failure> {
    let config = file.read()?.check(|r| {
        for section in ["cluster", "node", "log"] {
            settings::leave_to_others(r, section);
        }
        BalancerConfig::read(r)
    })?;
    Ok(config.admin_address())
}

async fn ask(admin: SocketAddr) -> Result<Members, Failure> {
    let client = reqwest::Client::builder().timeout(TIMEOUT).no_proxy().build();
    let client = client.map_err(|e| Failure::internal(e.to_string()))?;
    let out_of_reach = |e: reqwest::Error| {
        Failure::unavailable(format!(
            "no balancer answers at http://{admin}/members: {}\n  fix: start one (`tidegate up`), or name its private listener \
             with --admin",
            cause(&e)
        ))
    };
    let answer = client.get(format!("http://{admin}/members")).send().await.map_err(out_of_reach)?;
    answer.error_for_status().map_err(out_of_reach)?.json().await.map_err(out_of_reach)
}

/// The innermost cause; the outer ones only say that a request failed.
pub(crate) fn cause(error: &dyn std::error::Error) -> String {
    error.source().map_or_else(|| error.to_string(), cause)
}

fn table(members: &Members) -> String {
    const HEAD: [&str; 7] = ["NODE", "MODEL", "VERSION", "COLOR", "SITE", "STATE", "LOAD"];
    let mut rows = vec![HEAD.map(str::to_owned)];
    rows.extend(members.members.iter().map(row));
    let mut text = columns(&rows);
    if members.members.is_empty() {
        text.push_str("no node is known\n");
    }
    match members.registry {
        RegistryLink::Live => {}
        RegistryLink::Connecting => text.push_str("the registry has not been read yet\n"),
        RegistryLink::Lost => text.push_str("the registry is out of reach; this is what was last known\n"),
    }
    for member in &members.members {
        if let Some(error) = &member.last_probe_error {
            text.push_str(&format!("{}: {error}\n", member.node));
        }
    }
    text
}

/// Rows of cells as lines, each column as wide as its widest cell.
pub(crate) fn columns<const N: usize>(rows: &[[String; N]]) -> String {
    let width = |i: usize| rows.iter().map(|row| row[i].chars().count()).max().unwrap_or(0);
    let widths: [usize; N] = std::array::from_fn(width);
    let mut text = String::new();
    for row in rows {
        let cells = row.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}"));
        text.push_str(cells.collect::<Vec<_>>().join("  ").trim_end());
        text.push('\n');
    }
    text
}

fn row(member: &MemberReport) -> [String; 7] {
    let or_dash = |text: &str| if text.is_empty() { "-".to_owned() } else { text.to_owned() };
    [
        member.node.to_string(),
        models(member),
        or_dash(&member.version),
        member.color.to_string(),
        member.site.to_string(),
        member.state.as_str().to_owned(),
        load(member),
    ]
}

/// The models by name, with the state of those that are not ready.
fn models(member: &MemberReport) -> String {
    let one = |model: &ModelHealth| match model.state {
        ModelState::Ready => model.name.clone(),
        state => format!("{} ({})", model.name, state.as_str()),
    };
    match member.models.as_slice() {
        [] => member.model.clone(),
        models => models.iter().map(one).collect::<Vec<_>>().join(", "),
    }
}

fn load(member: &MemberReport) -> String {
    let (Some(running), Some(waiting)) = (member.running, member.waiting) else { return "-".to_owned() };
    match (member.kv_blocks_free, member.kv_blocks_total) {
        (Some(free), Some(total)) if total > 0 => {
            let used = 100 - u64::from(free.min(total)) * 100 / u64::from(total);
            format!("{running}+{waiting}, kv {used}%")
        }
        _ => format!("{running}+{waiting}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_has_a_line_for_each_node_and_says_what_is_wrong() {
        let body = r#"{"registry":"lost","members":[
            {"node":"n1","address":"127.0.0.1:1","model":"m","version":"","color":"blue","site":"local","weight":1,"state":"ready",
             "since":1,"listed":true,"device":"cpu","running":3,"waiting":1,"kv_blocks_free":25,"kv_blocks_total":100,"step":9,
             "last_probe_error":null,
             "models":[{"name":"m","state":"ready","running":3,"waiting":1,"kv_blocks_free":25,"kv_blocks_total":100},
                       {"name":"n","state":"unloaded","running":0,"waiting":0,"kv_blocks_free":0,"kv_blocks_total":0}]},
            {"node":"node-two","address":"127.0.0.1:2","model":"m","version":"7","color":"green","site":"cloud-a","weight":1,
             "state":"ejected","since":1,"listed":true,"device":null,"running":null,"waiting":null,"kv_blocks_free":null,
             "kv_blocks_total":null,"step":null,"last_probe_error":"connection refused"}]}"#;
        insta::assert_snapshot!(table(&serde_json::from_str(body).unwrap()), @r"
        NODE      MODEL            VERSION  COLOR  SITE     STATE    LOAD
        n1        m, n (unloaded)  -        blue   local    ready    3+1, kv 75%
        node-two  m                7        green  cloud-a  ejected  -
        the registry is out of reach; this is what was last known
        node-two: connection refused
        ");
    }
}
