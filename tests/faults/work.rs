//! A steady load whose every answer is known beforehand, and what becomes of the answers.

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use futures::{StreamExt, stream};
use tokio::task::JoinSet;

use super::requests::Request;
use crate::support::client::{Client, Heard};

/// Answers of an undisturbed run, each under its request.
pub(crate) struct Expected(Vec<(Request, String)>);

/// How one answer compares.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// To the byte, but for the time of its creation.
    Same,
    /// Whole, and another.
    Differs(String),
    /// The client was told of an error, or the answer broke off.
    Failed(String),
}

/// One answer of the load.
pub(crate) struct Taken {
    pub(crate) verdict: Verdict,
    /// Of a stream, the longest time between two events.
    pub(crate) pause: Option<Duration>,
    /// Whether a node was lost with it.
    pub(crate) moved: bool,
}

/// Where and how to ask, and the balancers' logs, which tell what was moved.
#[derive(Clone)]
pub(crate) struct Edge {
    pub(crate) url: String,
    pub(crate) client: Client,
    pub(crate) logs: Vec<PathBuf>,
}

/// A load that runs.
pub(crate) struct Work {
    stop: Arc<AtomicBool>,
    answers: Arc<AtomicUsize>,
    workers: JoinSet<Vec<Taken>>,
}

impl Expected {
    /// Asks everything once, in company.
    pub(crate) async fn ask(edge: &Edge, requests: Vec<Request>, workers: usize) -> (Self, Vec<Taken>) {
        let ask = |request: Request| async move { (ask(edge, &request).await, request) };
        let mut answers: Vec<_> = stream::iter(requests).map(ask).buffer_unordered(workers).collect().await;
        answers.sort_by(|(_, a), (_, b)| a.id.cmp(&b.id));
        let (mut all, mut taken) = (Vec::new(), Vec::new());
        for (heard, request) in answers {
            let (whole, pause) = (heard.status == 200 && heard.fault.is_none(), heard.pause);
            assert!(whole && !tells_error(&heard.text), "{request:?}: {:?}\n{}", heard.fault, heard.text);
            all.push((request, normal(&heard.text)));
            taken.push(Taken { verdict: Verdict::Same, pause, moved: false });
        }
        (Self(all), taken)
    }

    /// The streams among them.
    pub(crate) fn streams(&self) -> impl Iterator<Item = &(Request, String)> {
        self.0.iter().filter(|(request, _)| request.is_stream())
    }

    /// The parts of the load for so many clients: no request is in two of them, so that its log lines are one answer's.
    fn parts(&self, workers: usize) -> Vec<Vec<(Request, String)>> {
        (0..workers).map(|worker| self.0.iter().skip(worker).step_by(workers).cloned().collect()).collect()
    }
}

impl Work {
    /// Starts `workers` clients, each with one request at a time.
    pub(crate) fn start(edge: &Edge, expected: &Expected, workers: usize) -> Self {
        let (stop, answers) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let mut set = JoinSet::new();
        for part in expected.parts(workers) {
            set.spawn(work(edge.clone(), part, stop.clone(), answers.clone()));
        }
        Self { stop, answers, workers: set }
    }

    /// Answers so far.
    pub(crate) fn answers(&self) -> usize {
        self.answers.load(Relaxed)
    }

    /// Lets each client finish what it has.
    pub(crate) async fn stop(self) -> Vec<Taken> {
        self.stop.store(true, Relaxed);
        self.workers.join_all().await.into_iter().flatten().collect()
    }
}

async fn work(
    edge: Edge,
    part: Vec<(Request, String)>,
    stop: Arc<AtomicBool>,
    answers: Arc<AtomicUsize>,
) -> Vec<Taken> {
    let mut all = Vec::new();
    let mut losses: BTreeMap<&str, usize> = part.iter().map(|(r, _)| (r.id.as_str(), edge.losses(&r.id))).collect();
    for (request, expected) in part.iter().cycle() {
        if stop.load(Relaxed) {
            break;
        }
        let heard = ask(&edge, request).await;
        let lost = edge.losses(&request.id);
        let moved = losses.insert(&request.id, lost) != Some(lost);
        all.push(Taken { verdict: verdict(expected, &heard), pause: heard.pause, moved });
        answers.fetch_add(1, Relaxed);
    }
    all
}

/// One request; of what is no stream, pauses say nothing.
pub(crate) async fn ask(edge: &Edge, request: &Request) -> Heard {
    let mut heard = edge.client.hear(&format!("{}{}", edge.url, request.path), &request.id, &request.body).await;
    heard.pause = heard.pause.filter(|_| request.is_stream());
    heard
}

impl Edge {
    /// How often a node was lost under a request of this id.
    fn losses(&self, id: &str) -> usize {
        let of_id = format!("request_id={id} ");
        let is_loss = |line: &&str| line.contains("node lost") && line.contains(&of_id);
        let of_log = |log| std::fs::read_to_string(log).map_or(0, |text| text.lines().filter(is_loss).count());
        self.logs.iter().map(of_log).sum()
    }
}

/// How an answer compares with the one that was expected.
pub(crate) fn verdict(expected: &str, heard: &Heard) -> Verdict {
    let text = normal(&heard.text);
    match &heard.fault {
        Some(fault) => Verdict::Failed(fault.clone()),
        None if heard.status != 200 => Verdict::Failed(format!("{} {text}", heard.status)),
        None if text == expected => Verdict::Same,
        None if tells_error(&text) => Verdict::Failed(tail(&text)),
        None if expected.starts_with(&text) => Verdict::Failed(format!("broken off after {}", tail(&text))),
        None => Verdict::Differs(difference(expected, &text)),
    }
}

fn tells_error(text: &str) -> bool {
    text.contains("\"error\":{") || text.contains("event: error") || text.contains("response.failed")
}

/// Without comments, without the second in which it was made, and choice after choice: how those of one answer take turns is nobody's
/// promise.
fn normal(text: &str) -> String {
    let mut events: Vec<&str> = text.split_inclusive("\n\n").filter(|event| !event.starts_with(':')).collect();
    events.sort_by_key(|event| choice(event));
    let mut out = String::new();
    for mut rest in events {
        while let Some((before, after)) =
            ["\"created\":", "\"created_at\":"].iter().find_map(|key| rest.split_once(key))
        {
            out.push_str(before);
            rest = after.trim_start_matches(|c: char| c.is_ascii_digit());
        }
        out.push_str(rest);
    }
    out
}

/// Which choice an event is of; one that is of none comes last.
fn choice(event: &str) -> u32 {
    let index = event.split_once("\"choices\":[{\"index\":").map(|(_, rest)| rest);
    let digits = index.and_then(|rest| rest.split(|c: char| !c.is_ascii_digit()).next());
    digits.and_then(|digits| digits.parse().ok()).unwrap_or(u32::MAX)
}

fn tail(text: &str) -> String {
    text.chars().rev().take(200).collect::<Vec<_>>().into_iter().rev().collect()
}

/// Where two texts part.
fn difference(expected: &str, found: &str) -> String {
    let at = expected.bytes().zip(found.bytes()).take_while(|(a, b)| a == b).count();
    let around = |text: &str| {
        String::from_utf8_lossy(&text.as_bytes()[at.saturating_sub(120).min(text.len())..(at + 120).min(text.len())])
            .into_owned()
    };
    format!("at byte {at}: expected {:?}, found {:?}", around(expected), around(found))
}
