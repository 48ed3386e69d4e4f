//! Asking the private listener of a node that runs on this machine.

use std::{net::SocketAddr, time::Duration};

use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::exit::Failure;

/// Body of a refusal.
#[derive(Deserialize)]
struct Refused {
    error: Said,
}

#[derive(Deserialize)]
struct Said {
    message: String,
}

/// Asks, with a body by POST; gives the status and the answer. Blocks.
pub(crate) fn ask_node<T: Serialize, R: DeserializeOwned>(
    admin: SocketAddr,
    timeout: Duration,
    path: &str,
    body: Option<&T>,
) -> Result<(u16, R), Failure> {
    runtime()?.block_on(send(format!("http://{admin}{path}"), timeout, body))
}

/// For a command that waits for one thing.
pub(crate) fn runtime() -> Result<tokio::runtime::Runtime, Failure> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|e| Failure::internal(format!("cannot set up the runtime: {e}")))
}

async fn send<T: Serialize, R: DeserializeOwned>(
    url: String,
    timeout: Duration,
    body: Option<&T>,
) -> Result<(u16, R), Failure> {
    let client = reqwest::Client::builder().timeout(timeout).no_proxy().build();
    let client = client.map_err(|e| Failure::internal(e.to_string()))?;
    let out_of_reach = |e: reqwest::Error| {
        Failure::unavailable(format!(
            "no node answers at {url}: {}\n  fix: name its private listener with --admin; its log says where that is",
            crate::status::cause(&e)
        ))
    };
    let request = match body {
        Some(body) => client.post(&url).json(body),
        None => client.get(&url),
    };
    let answer = request.send().await.map_err(out_of_reach)?;
    let status = answer.status();
    if status.is_success() {
        return Ok((status.as_u16(), answer.json().await.map_err(out_of_reach)?));
    }
    let Refused { error: Said { message } } = answer.json().await.map_err(out_of_reach)?;
    Err(if status.is_client_error() { Failure::usage(message) } else { Failure::unavailable(message) })
}
