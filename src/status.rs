//! `tidegate status`: the cluster as a running balancer sees it, in one table.

use std::{net::SocketAddr, time::Duration};

use tidegate_balancer::{
    BalancerConfig,
    admin::{MemberReport, Members, RegistryLink},
};

use crate::{
    exit::Failure,
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
    let members = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|e| Failure::internal(format!("cannot set up the runtime: {e}")))?
        .block_on(ask(admin))?;
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
fn cause(error: &dyn std::error::Error) -> String {
    error.source().map_or_else(|| error.to_string(), cause)
}

fn table(members: &Members) -> String {
    const HEAD: [&str; 7] = ["NODE", "MODEL", "VERSION", "COLOR", "SITE", "STATE", "LOAD"];
    let mut rows = vec![HEAD.map(str::to_owned)];
    rows.extend(members.members.iter().map(row));
    let widths: Vec<usize> =
        (0..HEAD.len()).map(|i| rows.iter().map(|row| row[i].chars().count()).max().unwrap_or(0)).collect();
    let mut text = String::new();
    for row in &rows {
        let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}"));
        text.push_str(cells.collect::<Vec<_>>().join("  ").trim_end());
        text.push('\n');
    }
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

fn row(member: &MemberReport) -> [String; 7] {
    let or_dash = |text: &str| if text.is_empty() { "-".to_owned() } else { text.to_owned() };
    [
        member.node.to_string(),
        member.model.clone(),
        or_dash(&member.version),
        member.color.to_string(),
        member.site.to_string(),
        member.state.as_str().to_owned(),
        load(member),
    ]
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
             "last_probe_error":null},
            {"node":"node-two","address":"127.0.0.1:2","model":"m","version":"7","color":"green","site":"cloud-a","weight":1,
             "state":"ejected","since":1,"listed":true,"device":null,"running":null,"waiting":null,"kv_blocks_free":null,
             "kv_blocks_total":null,"step":null,"last_probe_error":"connection refused"}]}"#;
        insta::assert_snapshot!(table(&serde_json::from_str(body).unwrap()), @r"
        NODE      MODEL  VERSION  COLOR  SITE     STATE    LOAD
        n1        m      -        blue   local    ready    3+1, kv 75%
        node-two  m      7        green  cloud-a  ejected  -
        the registry is out of reach; this is what was last known
        node-two: connection refused
        ");
    }
}
