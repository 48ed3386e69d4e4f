//! The audit log of a running edge: who asked what, the edge's own life, a disk that is full, a folder that goes away.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use serde_json::Value;
use tempfile::TempDir;
use tidegate_balancer::audit::{KeyRing, Records, Report, verify};

use crate::{
    collector::Collector,
    support::{CHAT, House, PATIENCE, chat},
};

struct Log {
    folder: PathBuf,
    _temporary: TempDir,
}

impl Log {
    fn new() -> Self {
        let temporary = tempfile::tempdir().unwrap();
        Self { folder: temporary.path().join("audit"), _temporary: temporary }
    }

    fn section(&self, more: &str) -> String {
        format!("[balancer.audit]\ndir = {:?}\n{more}\n", self.folder)
    }

    fn records(&self) -> Vec<Value> {
        let mut records = Records::open(&self.folder, KeyRing::default()).unwrap();
        let mut found = Vec::new();
        while let Some(line) = records.next_line().unwrap() {
            found.push(serde_json::from_slice(line).unwrap());
        }
        found
    }

    fn verify(&self) -> Report {
        verify(&self.folder, &KeyRing::default()).unwrap()
    }

    fn is_whole(&self) {
        let report = self.verify();
        assert!(report.faults.is_empty(), "{report:#?}");
    }

    fn events(&self, event: &str) -> Vec<Value> {
        self.records().into_iter().filter(|record| record["event"] == event).collect()
    }

    async fn until(&self, what: &str, wanted: impl Fn(&[Value]) -> bool) -> Vec<Value> {
        let began = Instant::now();
        loop {
            let records = self.records();
            if wanted(&records) {
                return records;
            }
            assert!(began.elapsed() < PATIENCE, "not in the log: {what}; {records:#?}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

fn requests(records: &[Value]) -> usize {
    records.iter().filter(|record| record["event"] == "request").count()
}

#[tokio::test]
async fn each_request_and_the_edges_life_are_recorded_and_what_is_asked_is_not() {
    let log = Log::new();
    let mut house = House::with(1, &log.section("")).await;
    let mut body = chat(true);
    body["messages"][0]["content"] = "a secret of mine".into();
    let response = house.client.post(house.url(CHAT)).header("x-request-id", "mine").header("user-agent", "probe/1");
    response.body(body.to_string()).send().await.unwrap().text().await.unwrap();
    house.client.get(house.url("/nowhere?key=hidden")).send().await.unwrap();
    house.client.get(house.url("/health")).send().await.unwrap();
    house.fire();
    house.ended().await;
    log.is_whole();
    let records = log.records();
    let events: Vec<&str> = records.iter().map(|record| record["event"].as_str().unwrap()).collect();
    assert_eq!(events[0], "start");
    assert_eq!(events[events.len() - 2..], ["drain", "stop"]);
    assert!(records.iter().any(|r| r["event"] == "member" && r["node"] == "n0" && r["to"] == "ready"), "{records:#?}");
    let asked: Vec<&Value> = records.iter().filter(|record| record["event"] == "request").collect();
    assert_eq!(asked.len(), 2, "asking for the edge's health is not recorded: {asked:#?}");
    let first = asked[0];
    for (key, value) in [("request_id", "mine"), ("client", "127.0.0.1"), ("method", "POST"), ("path", CHAT)] {
        assert_eq!(first[key], value);
    }
    for (key, value) in [("model", "tiny"), ("node", "n0"), ("reason", "ok"), ("agent", "probe/1")] {
        assert_eq!(first[key], value);
    }
    assert_eq!((first["status"].as_u64(), first["tokens"].as_u64()), (Some(200), Some(3)));
    assert!(first["bytes_in"].as_u64() > Some(50) && first["bytes_out"].as_u64() > Some(50), "{first}");
    assert_eq!((asked[1]["status"].as_u64(), asked[1]["target"].as_str()), (Some(404), Some("/nowhere")));
    let all = serde_json::to_string(&records).unwrap();
    assert!(!all.contains("a secret of mine") && !all.contains("hidden"), "{all}");
    let mode =
        |path: &Path| std::os::unix::fs::PermissionsExt::mode(&fs::metadata(path).unwrap().permissions()) & 0o777;
    assert_eq!(mode(&log.folder), 0o700);
    for entry in fs::read_dir(&log.folder).unwrap() {
        assert_eq!(mode(&entry.unwrap().path()), 0o600);
    }
}

#[tokio::test]
async fn what_is_asked_is_recorded_where_the_configuration_says_so() {
    let log = Log::new();
    let house = House::with(1, &log.section("bodies = true\nmax_body = \"1KiB\"")).await;
    assert_eq!(house.ask(&chat(false)).await.0, 200);
    let records = log.until("the request", |records| requests(records) == 1).await;
    let record = records.iter().find(|record| record["event"] == "request").unwrap();
    assert_eq!(record["body"], chat(false).to_string());
}

#[tokio::test]
async fn a_file_is_closed_when_it_is_large_and_nothing_is_lost_by_it() {
    let log = Log::new();
    let mut house = House::with(1, &log.section("rotate_size = \"4KiB\"")).await;
    let mut load = tokio::task::JoinSet::new();
    for _ in 0..8 {
        let (client, url) = (house.client.clone(), house.url(CHAT));
        load.spawn(async move {
            for _ in 0..30 {
                let response = client.post(&url).body(chat(false).to_string()).send().await.unwrap();
                assert_eq!(response.status(), 200);
            }
        });
    }
    load.join_all().await;
    house.fire();
    house.ended().await;
    assert_eq!(log.events("request").len(), 240);
    let began = Instant::now();
    let names = || -> Vec<String> {
        fs::read_dir(&log.folder).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect()
    };
    while names().iter().filter(|name| name.ends_with(".jsonl")).count() > 1 && began.elapsed() < PATIENCE {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(names().iter().filter(|name| name.ends_with(".gz")).count() > 3, "{:?}", names());
    let report = log.verify();
    assert!(report.faults.is_empty() && report.files > 4, "{report:#?}");
}

/// A folder of its own on a disk of 64 KiB.
struct SmallDisk(PathBuf, #[allow(dead_code, reason = "removed when it is dropped")] TempDir);

impl SmallDisk {
    /// None where this user may not mount one.
    fn mount() -> Option<Self> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().to_owned();
        let mount = Command::new("mount").args(["-t", "tmpfs", "-o", "size=64k,mode=700", "tmpfs"]).arg(&path).output();
        match mount {
            Ok(output) if output.status.success() => Some(Self(path, folder)),
            other => {
                eprintln!("skipped: a full disk needs leave to mount one (root): {other:?}");
                None
            }
        }
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(&self.0).status();
    }
}

#[tokio::test]
async fn on_a_full_disk_an_open_log_serves_on_and_says_how_many_are_lost() {
    let Some(disk) = SmallDisk::mount() else { return };
    let log = Log { folder: disk.0.join("audit"), _temporary: tempfile::tempdir().unwrap() };
    let house = House::with(1, &log.section("queue = 16\ncompress = false")).await;
    let filler = disk.0.join("filler");
    fs::write(&filler, vec![0; 24 << 10]).unwrap();
    let mut asked = 0;
    while !house.metrics().await.contains("\ntidegate_audit_failing 1\n") {
        assert_eq!(house.ask(&chat(false)).await.0, 200);
        asked += 1;
        assert!(asked < 1000, "the disk is never full");
    }
    for _ in 0..60 {
        assert_eq!(house.ask(&chat(false)).await.0, 200);
        asked += 1;
    }
    fs::remove_file(filler).unwrap();
    let records = log.until("a gap", |records| records.iter().any(|r| r["event"] == "gap")).await;
    let lost: u64 = records.iter().filter_map(|record| record["lost"].as_u64()).sum();
    assert!(lost > 0);
    log.until("every other one", |records| requests(records) as u64 + lost >= asked).await;
    assert!(house.metrics().await.contains("\ntidegate_audit_failing 0\n"));
    assert_eq!(requests(&log.records()) as u64 + lost, asked);
    log.is_whole();
}

#[tokio::test]
async fn on_a_full_disk_a_closed_log_refuses_and_loses_nothing() {
    let Some(disk) = SmallDisk::mount() else { return };
    let log = Log { folder: disk.0.join("audit"), _temporary: tempfile::tempdir().unwrap() };
    let house = House::with(1, &log.section("on_failure = \"closed\"\ncompress = false")).await;
    let filler = disk.0.join("filler");
    fs::write(&filler, vec![0; 24 << 10]).unwrap();
    let mut served = 0;
    let refused = loop {
        let (status, body) = house.ask(&chat(false)).await;
        if status != 200 {
            break (status, body);
        }
        served += 1;
        assert!(served < 1000, "the disk is never full");
    };
    assert_eq!(refused.0, 503);
    assert!(refused.1.contains("audit_unavailable"), "{}", refused.1);
    assert_eq!(house.client.get(house.url("/health")).send().await.unwrap().status(), 200);
    fs::remove_file(filler).unwrap();
    let began = Instant::now();
    while house.ask(&chat(false)).await.0 != 200 {
        assert!(began.elapsed() < PATIENCE, "it refuses on");
    }
    served += 1;
    log.until("each that was served", |records| {
        records.iter().filter(|r| r["event"] == "request" && r["status"] == 200).count() == served
    })
    .await;
    let lost: Vec<Value> = log.events("gap").iter().map(|gap| gap["lost"].clone()).collect();
    assert!(!lost.is_empty() && lost.iter().all(|lost| *lost == 0), "{lost:?}");
    log.is_whole();
}

#[tokio::test]
async fn a_folder_that_goes_away_is_made_anew_and_the_loss_shows() {
    let log = Log::new();
    let house = House::with(1, &log.section("")).await;
    assert_eq!(house.ask(&chat(false)).await.0, 200);
    log.until("the request", |records| requests(records) == 1).await;
    fs::remove_dir_all(&log.folder).unwrap();
    fs::write(&log.folder, "in the way").unwrap();
    assert_eq!(house.ask(&chat(false)).await.0, 200);
    let began = Instant::now();
    while !house.metrics().await.contains("\ntidegate_audit_failing 1\n") {
        assert!(began.elapsed() < PATIENCE, "it is not said");
    }
    fs::remove_file(&log.folder).unwrap();
    let began = Instant::now();
    while !log.folder.is_dir() || requests(&log.records()) == 0 {
        assert!(began.elapsed() < PATIENCE, "it is not written again");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(log.records()[0]["event"], "recovered");
    let faults = log.verify().faults;
    assert!(faults.iter().any(|fault| fault.what.contains("are missing")), "{faults:#?}");
}

#[tokio::test]
async fn two_edges_write_one_chain() {
    let log = Log::new();
    let section = log.section("");
    let (one, two) = tokio::join!(House::with(1, &section), House::with(1, &section));
    for _ in 0..20 {
        assert_eq!(one.ask(&chat(false)).await.0, 200);
        assert_eq!(two.ask(&chat(false)).await.0, 200);
    }
    log.until("all of both", |records| requests(records) == 40).await;
    log.is_whole();
}

#[tokio::test]
async fn syslog_gets_each_record_also_when_it_comes_late() {
    let (tcp, udp) = (Log::new(), Log::new());
    let receiver = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let to = receiver.local_addr().unwrap();
    let house = House::with(1, &udp.section(&format!("syslog = \"udp://{to}\""))).await;
    assert_eq!(house.ask(&chat(false)).await.0, 200);
    let mut datagram = vec![0; 9000];
    let message = loop {
        let length = tokio::time::timeout(PATIENCE, receiver.recv(&mut datagram)).await.unwrap().unwrap();
        let text = String::from_utf8(datagram[..length].to_vec()).unwrap();
        if text.contains(" request [") {
            break text;
        }
    };
    assert!(message.starts_with("<110>1 20") && message.contains("status=\"200\""), "{message}");

    // nobody listens there yet
    let to = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let mut house = House::with(1, &tcp.section(&format!("syslog = \"tcp://{to}\""))).await;
    for _ in 0..5 {
        assert_eq!(house.ask(&chat(false)).await.0, 200);
    }
    tcp.until("all of them", |records| requests(records) == 5).await;
    let listener = tokio::net::TcpListener::bind(to).await.unwrap();
    let (mut stream, _) = tokio::time::timeout(PATIENCE, listener.accept()).await.unwrap().unwrap();
    house.fire();
    house.ended().await;
    let mut text = String::new();
    tokio::io::AsyncReadExt::read_to_string(&mut stream, &mut text).await.unwrap();
    let mut events = Vec::new();
    let mut rest = text.as_str();
    while let Some((length, more)) = rest.split_once(' ') {
        let (message, more) = more.split_at(length.parse().unwrap());
        events.push(message.split(' ').nth(5).unwrap().to_owned());
        rest = more;
    }
    let written: Vec<String> = tcp.records().iter().map(|r| r["event"].as_str().unwrap().to_owned()).collect();
    assert_eq!(events, written);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_collector_gets_each_record_as_a_log() {
    let (log, collector) = (Log::new(), Collector::start().await);
    let section = format!("{}\n{}", log.section(""), collector.section("logs = true\ntraces = false"));
    let mut house = House::with(1, &section).await;
    assert_eq!(house.ask(&chat(false)).await.0, 200);
    house.fire();
    house.ended().await;
    let records = log.records();
    let logs = collector.logs();
    let texts: Vec<Value> = logs.iter().map(|(text, _)| serde_json::from_str(text).unwrap()).collect();
    assert_eq!(texts, records);
    let request = logs.iter().find(|(_, fields)| fields["tidegate.event"] == "request").unwrap();
    assert_eq!((request.1["tidegate.status"].as_str(), request.1["tidegate.node"].as_str()), ("200", "n0"));
    assert!(collector.spans().is_empty());
}
