//! Goal: another process takes a balancer's place under load, and no connection is refused and no stream broken; one that cannot serve
//! changes nothing. Method: two nodes, clients that open a new connection for each request, clients that keep theirs, and long streams,
//! all the while `tidegate balancer --upgrade` is started again and again, badly configured and well.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    task::JoinSet,
    time::{Instant, sleep},
};

use crate::support::{
    LOADING,
    client::{Client, End, Load, chat_stream},
    cluster::{Cluster, NodePlan, Plan, Registry},
    process::{Process, finish, tidegate},
    until,
};

/// From the last stream's end to the end of the process that had it.
const LEAVES: Duration = Duration::from_secs(2);

/// Requests over a new connection each, until they are told to stop; how many, and what went wrong.
fn newcomers(edge: &str, stop: &Arc<AtomicBool>) -> JoinSet<(usize, Vec<String>)> {
    let mut set = JoinSet::new();
    for _ in 0..4 {
        let (address, stop) = (edge.trim_start_matches("http://").to_owned(), Arc::clone(stop));
        set.spawn(async move {
            let (mut count, mut faults) = (0, Vec::new());
            while !stop.load(Ordering::Relaxed) {
                count += 1;
                match health(&address).await {
                    Ok(text) if text.starts_with("HTTP/1.1 200") => {}
                    other => faults.push(format!("{other:?}")),
                }
                sleep(Duration::from_millis(2)).await;
            }
            (count, faults)
        });
    }
    set
}

async fn health(address: &str) -> std::io::Result<String> {
    let mut stream = TcpStream::connect(address).await?;
    stream.write_all(b"GET /health HTTP/1.1\r\nhost: t\r\nconnection: close\r\n\r\n").await?;
    let mut text = String::new();
    stream.read_to_string(&mut text).await?;
    Ok(text)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_balancer_takes_the_place_of_the_old_and_nobody_notices() {
    let nodes = ["n1", "n2"].map(|id| NodePlan { lines: "threads = 1", ..NodePlan::named(id) });
    let mut plan = Plan::new(Registry::Static, &nodes);
    let folder = plan.folder.path().to_owned();
    let lines = format!("upgrade_socket = \"{}/run/upgrade.sock\"", folder.display());
    plan.balancer = &lines;
    let mut cluster = Cluster::start(plan).await;
    let file = folder.join("balancer.toml");
    let upgrade = |file: &std::path::Path| {
        let mut command = tidegate();
        command.args(["balancer", "--upgrade", "--config"]).arg(file);
        command
    };

    // neither of these can serve, so nothing changes
    let (bad, lost) = (folder.join("bad.toml"), folder.join("lost.toml"));
    let text = fs::read_to_string(&file).unwrap();
    fs::write(&bad, text.replace("upgrade_socket", "no_such_key = 1\nupgrade_socket")).unwrap();
    // an address where no node is
    fs::write(&lost, text.replace("address = \"127.0.0.1:", "address = \"127.0.0.3:")).unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let mut coming = newcomers(&cluster.edge(), &stop);
    let load = Load::start(&cluster.edge(), 2);
    let failed = |file: &std::path::Path| {
        let mut command = upgrade(file);
        tokio::task::spawn_blocking(move || finish(&mut command))
    };
    let (code, _, err) = failed(&bad).await.unwrap();
    assert!(code == 64 && err.contains("no_such_key"), "{code} {err}");
    let (code, _, err) = failed(&lost).await.unwrap();
    assert!(code == 69 && err.contains("no node became ready"), "{code} {err}");
    assert!(cluster.balancer().ended_within(Duration::from_millis(50)).is_none(), "the old one has left");

    let url = format!("{}/v1/chat/completions", cluster.edge());
    let mut successors: Vec<Process> = Vec::new();
    for turn in 0..2 {
        let mut streams = JoinSet::new();
        for i in 0..3 {
            let (client, url) = (Client::new(), url.clone());
            let mut body = chat_stream(&format!("Tell story number {i} of a lighthouse."), 250);
            body["ignore_eos"] = true.into();
            streams.spawn(async move { client.stream(&url, &body, |_| {}).await });
        }
        sleep(Duration::from_millis(700)).await;
        successors.push(Process::start(&format!("balancer-{turn}"), &folder, &mut upgrade(&file)));
        let said = || successors[turn].output();
        until("it serves", LOADING, || async { said().contains("the balancer before leaves") }).await;
        assert!(!streams.is_empty(), "the streams ended before there was anything to show");
        for streamed in streams.join_all().await {
            assert_eq!(streamed.end(), End::Whole, "{:?}", streamed.fault);
            assert_eq!(streamed.tokens, 250);
        }
        let ended = Instant::now();
        let old = if turn == 0 { cluster.balancer() } else { &mut successors[turn - 1] };
        let status = tokio::task::block_in_place(|| old.ended_within(Duration::from_secs(10)));
        println!("the old one left {:?} after its last stream", ended.elapsed());
        assert_eq!(status.and_then(|status| status.code()), Some(0), "{}", old.output());
        assert!(ended.elapsed() < LEAVES);
        assert!(old.output().contains("every request has ended"));
    }
    assert_eq!(cluster.ready().await, ["n1", "n2"]);

    stop.store(true, Ordering::Relaxed);
    let (mut count, mut faults) = (0, Vec::new());
    while let Some(Ok((n, more))) = coming.join_next().await {
        count += n;
        faults.extend(more);
    }
    let tally = load.stop().await;
    println!("{count} new connections, {:?} requests over kept ones", tally.ends);
    assert!(faults.is_empty(), "{} of {count}: {:?}", faults.len(), &faults[..faults.len().min(3)]);
    assert_eq!(tally.count(End::Failed) + tally.count(End::Broken), 0, "{:?}", tally.faults);
    assert!(count > 1000 && tally.count(End::Whole) > 10, "too few to say anything");
    let (code, _, err) = failed_without(&folder).await;
    assert!(code == 69 && err.contains("no running balancer") && err.contains("without --upgrade"), "{code} {err}");
}

/// The sockets are nobody else's to take, so the balancer does not even begin.
#[tokio::test]
async fn sockets_are_not_offered_where_others_can_reach_them() {
    let folder = tempfile::tempdir().unwrap();
    let (file, open) = (folder.path().join("balancer.toml"), folder.path().join("open"));
    fs::create_dir(&open).unwrap();
    fs::set_permissions(&open, fs::Permissions::from_mode(0o755)).unwrap();
    let text = format!(
        "[cluster.registry]\nkind = \"static\"\n[balancer]\nlisten = \"127.0.0.1:0\"\nadmin.listen = \"127.0.0.1:0\"\n\
         upgrade_socket = \"{}/upgrade.sock\"\n",
        open.display()
    );
    fs::write(&file, text).unwrap();
    let (code, _, err) = finish(tidegate().args(["balancer", "--config"]).arg(&file));
    assert!(code == 64 && err.contains("balancer.upgrade_socket") && err.contains("chmod 700"), "{code} {err}");
    assert!(!err.contains("ERROR"), "parts of it had begun: {err}");
}

/// Nobody offers sockets there.
async fn failed_without(folder: &std::path::Path) -> (i32, String, String) {
    let file = folder.join("nobody.toml");
    let text = "[cluster.registry]\nkind = \"static\"\n[balancer]\nupgrade_socket = \"/nonexistent/upgrade.sock\"\n";
    fs::write(&file, text).unwrap();
    let mut command = tidegate();
    command.args(["balancer", "--upgrade", "--config"]).arg(&file);
    tokio::task::spawn_blocking(move || finish(&mut command)).await.unwrap()
}
