//! `tidegate model load`, `unload` and `ps`: the models of a running node, over its private listener.

use std::{net::SocketAddr, time::Duration};

use tidegate_node::{
    ADMIN_PORT,
    admin::{self, LoadRequest, Table, UnloadRequest},
    models::{ModelRef, Source},
    served::Report,
};

use crate::{exit::Failure, private};

/// A large model takes minutes; the node itself waits no longer than this.
const LOAD_TIMEOUT: Duration = Duration::from_secs(3600);

const TIMEOUT: Duration = Duration::from_secs(60);

/// Which node.
#[derive(Debug, clap::Args)]
pub(crate) struct Node {
    /// Private listener of the node, its node.admin.listen
    #[arg(long, value_name = "ADDR", default_value_t = SocketAddr::from(([127, 0, 0, 1], ADMIN_PORT)))]
    admin: SocketAddr,
}

/// Loads a model; returns once it serves.
pub(crate) fn load(node: &Node, model: &str, name: Option<String>) -> Result<(), Failure> {
    let request = LoadRequest { model: absolute(model), name };
    let (_, table) = node.ask(LOAD_TIMEOUT, admin::LOAD, Some(&request))?;
    print!("{}", shown(&table));
    Ok(())
}

/// A path of a file that is here, in words that hold in the node's folder too.
fn absolute(model: &str) -> String {
    let reference = model.parse::<ModelRef>();
    let path = match reference.as_ref().map(ModelRef::source) {
        Ok(Source::Path(path)) if path.exists() => std::path::absolute(path).ok(),
        _ => None,
    };
    path.map_or_else(|| model.to_owned(), |path| path.display().to_string())
}

/// Unloads a model.
pub(crate) fn unload(node: &Node, request: &UnloadRequest) -> Result<(), Failure> {
    let (status, table) = node.ask(TIMEOUT, admin::UNLOAD, Some(request))?;
    if status == 202 {
        println!("'{}' takes no more requests, and goes once its running answers have ended", request.name);
    }
    print!("{}", shown(&table));
    Ok(())
}

/// Shows what a node serves.
pub(crate) fn ps(node: &Node) -> Result<(), Failure> {
    let (_, table) = node.ask::<()>(TIMEOUT, admin::MODELS, None)?;
    print!("{}", shown(&table));
    Ok(())
}

impl Node {
    fn ask<T: serde::Serialize>(
        &self,
        timeout: Duration,
        path: &str,
        body: Option<&T>,
    ) -> Result<(u16, Table), Failure> {
        private::ask_node(self.admin, timeout, path, body)
    }
}

fn shown(table: &Table) -> String {
    const HEAD: [&str; 7] = ["NAME", "MODEL", "STATE", "MEMORY", "CONTEXT", "RUNNING", "IDLE"];
    let mut rows = vec![HEAD.map(str::to_owned)];
    rows.extend(table.models.iter().map(row));
    let mut text = crate::status::columns(&rows);
    let taken: u64 = table.models.iter().map(|model| model.bytes).sum();
    text.push_str(&format!("{}: {} of {} for models\n", table.node, mib(taken), mib(table.models_memory)));
    for model in &table.models {
        if let Some(error) = &model.error {
            text.push_str(&format!("{}: {error}\n", model.health.name));
        }
    }
    text
}

fn row(report: &Report) -> [String; 7] {
    let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
    let mut state = report.health.state.as_str().to_owned();
    if !report.offered && report.bytes == 0 {
        state.push_str(", not offered");
    }
    if report.pinned {
        state.push_str(", pinned");
    }
    [
        report.health.name.clone(),
        report.model.clone(),
        state,
        or_dash((report.bytes > 0).then(|| mib(report.bytes))),
        or_dash(report.context.map(|tokens| tokens.to_string())),
        format!("{}+{}", report.health.running, report.health.waiting),
        or_dash(report.idle_s.map(|seconds| format!("{seconds} s"))),
    ]
}

fn mib(bytes: u64) -> String {
    format!("{} MiB", bytes.div_ceil(1 << 20))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_says_what_stands_and_why_what_does_not() {
        let body = r#"{"node":"n1","models_memory":1073741824,"models":[
            {"name":"m","state":"ready","running":2,"waiting":1,"kv_blocks_free":1,"kv_blocks_total":2,"model":"smollm2-135m","offered":true,
             "load":"start","pinned":true,"bytes":209715200,"context":2048,"open":3,"idle_s":0,"error":null},
            {"name":"gone","state":"unloaded","running":0,"waiting":0,"kv_blocks_free":0,"kv_blocks_total":0,"model":"./g.gguf","offered":false,
             "load":"first_use","pinned":false,"bytes":0,"context":null,"open":0,"idle_s":null,"error":null},
            {"name":"bad","state":"failed","running":0,"waiting":0,"kv_blocks_free":0,"kv_blocks_total":0,"model":"./b.gguf","offered":true,
             "load":"first_use","pinned":false,"bytes":0,"context":null,"open":0,"idle_s":7,"error":"./b.gguf is not a sound model file"}]}"#;
        insta::assert_snapshot!(shown(&serde_json::from_str(body).unwrap()), @r"
        NAME  MODEL         STATE                  MEMORY   CONTEXT  RUNNING  IDLE
        m     smollm2-135m  ready, pinned          200 MiB  2048     2+1      0 s
        gone  ./g.gguf      unloaded, not offered  -        -        0+0      -
        bad   ./b.gguf      failed                 -        -        0+0      7 s
        n1: 200 MiB of 1024 MiB for models
        bad: ./b.gguf is not a sound model file
        ");
    }
}
