//! Goal: a server of the OpenAI API that knows nothing of Tidegate shares a model's requests with a node, and is left when it is lost.
//! Method: a real balancer and a real node, beside them a small stand-in for such a server in this process, which is stopped, started
//! again, made to break off, and taken out of the configuration while clients never pause.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::{TcpListener, TcpStream},
    task::JoinSet,
    time::sleep,
};

use crate::support::{
    LOADING, MODEL,
    client::{Client, End, Load, chat_stream},
    cluster::{Cluster, NodePlan, Plan, Registry},
    etcd::free_port,
    process::ensure_model,
    until,
};

const ANSWER: &str = r#"{"object": "chat.completion", "choices": [{"message": {"content": "blue"}}]}"#;
const PIECE: &str = "data: {\"choices\": [{\"delta\": {\"content\": \"blue\"}}]}\n\n";

/// What it heard, and how it is to answer.
#[derive(Default)]
struct Memory {
    heads: Mutex<Vec<String>>,
    breaks_off: AtomicBool,
}

/// The server; dropping it closes all its connections.
struct StandIn(#[expect(dead_code, reason = "held for its end")] JoinSet<()>);

impl StandIn {
    async fn start(port: u16, memory: &Arc<Memory>) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", port)).await.unwrap();
        let (memory, mut tasks) = (Arc::clone(memory), JoinSet::new());
        tasks.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                connections.spawn(serve(stream, Arc::clone(&memory)));
            }
        });
        Self(tasks)
    }
}

async fn serve(stream: TcpStream, memory: Arc<Memory>) -> Option<()> {
    let mut stream = BufReader::new(stream);
    loop {
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            (stream.read_line(&mut head).await.ok()? > 0).then_some(())?;
        }
        let length = head.lines().find_map(|line| line.to_lowercase().strip_prefix("content-length: ")?.parse().ok());
        let mut body = vec![0; length.unwrap_or(0)];
        stream.read_exact(&mut body).await.ok()?;
        let is_probe = head.starts_with("GET /v1/models ");
        if !is_probe {
            memory.heads.lock().unwrap().push(head);
        }
        let wants_stream = String::from_utf8(body).unwrap().contains("\"stream\":true");
        let breaks_off = !is_probe && memory.breaks_off.load(Ordering::Relaxed);
        let (media_type, answer) = match wants_stream {
            true if breaks_off => ("text/event-stream", PIECE.to_owned()),
            true => ("text/event-stream", format!("{PIECE}{PIECE}data: [DONE]\n\n")),
            false => ("application/json", ANSWER.to_owned()),
        };
        // of an answer that breaks off, one byte is missing
        let length = answer.len() + usize::from(breaks_off);
        let head = format!("HTTP/1.1 200 OK\r\ncontent-type: {media_type}\r\ncontent-length: {length}\r\n\r\n");
        stream.write_all(format!("{head}{answer}").as_bytes()).await.ok()?;
        stream.flush().await.ok()?;
        (!breaks_off).then_some(())?;
    }
}

#[tokio::test]
async fn a_foreign_server_shares_a_nodes_requests_and_is_left_when_it_is_lost() {
    ensure_model();
    let (folder, port, memory) = (tempfile::tempdir().unwrap(), free_port(), Arc::new(Memory::default()));
    let key = folder.path().join("key");
    fs::write(&key, "sk-theirs").unwrap();
    fs::set_permissions(&key, fs::Permissions::from_mode(0o600)).unwrap();
    let upstream = format!(
        "[[balancer.upstreams]]\nid = \"cloud\"\nkind = \"openai\"\nbase_url = \"http://127.0.0.1:{port}/v1\"\n\
         models = [\"{MODEL}=org/their-name\"]\napi_key_file = {key:?}\nhealth_interval = \"500ms\"\n"
    );
    let nodes = [NodePlan::named("n1")];
    let mut cluster = Cluster::start(Plan { balancer: &upstream, ..Plan::new(Registry::Static, &nodes) }).await;
    let stand_in = StandIn::start(port, &memory).await;
    cluster.until_ready(&["cloud", "n1"], LOADING).await;

    let load = Load::start(&cluster.edge(), 4);
    sleep(Duration::from_secs(2)).await;
    drop(stand_in);
    cluster.until_ready(&["n1"], LOADING).await;
    let stand_in = StandIn::start(port, &memory).await;
    cluster.until_ready(&["cloud", "n1"], LOADING).await;
    sleep(Duration::from_secs(1)).await;
    let tally = load.stop().await;
    println!("{:?}, the slowest took {:?}", tally.ends, tally.slowest);
    assert_eq!((tally.count(End::Failed), tally.count(End::Broken)), (0, 0), "{:?}", tally.faults);
    let heads = std::mem::take(&mut *memory.heads.lock().unwrap());
    assert!(
        heads.len() > 4 && tally.count(End::Whole) > heads.len(),
        "{} of {:?} went abroad",
        heads.len(),
        tally.ends
    );
    for head in &heads {
        assert!(head.starts_with("POST /v1/chat/completions "), "{head}");
        assert!(head.contains("Bearer sk-theirs") && !head.to_lowercase().contains("x-tidegate"), "{head}");
    }

    cluster.kill_node("n1");
    cluster.until_ready(&["cloud"], LOADING).await;
    let (client, url) = (Client::new(), format!("{}/v1/chat/completions", cluster.edge()));
    let body = chat_stream("Name a colour.", 8);
    let whole = client.stream(&url, &body, |_| {}).await;
    assert_eq!((whole.end(), whole.node.as_deref(), &*whole.text), (End::Whole, Some("cloud"), "blueblue"));
    memory.breaks_off.store(true, Ordering::Relaxed);
    let cut = Client::new().stream(&url, &body, |_| {}).await;
    assert!(!cut.is_whole && cut.text == "blue", "{cut:?}");
    assert!(cut.fault.as_ref().is_some_and(|fault| fault.contains("node_lost")), "{cut:?}");

    let file = cluster.folder().join("balancer.toml");
    let without = fs::read_to_string(&file).unwrap().replace(&upstream, "");
    fs::write(&file, without).unwrap();
    let reports = format!("{}/members", cluster.admin());
    until("what is configured no more has left", LOADING, || async {
        let answer = client.get(&reports).await;
        answer.is_ok_and(|answer| answer.body["members"].as_array().is_some_and(|members| members.len() == 1))
    })
    .await;
    drop(stand_in);
}
