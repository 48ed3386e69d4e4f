//! Goal: the metrics of node and balancer are there under the names that dashboards for vLLM use, tell what happened, and pass a linter.
//! Method: requests whose outcome is known, the figures compared with what the answers said; then the rules of Prometheus' own linter,
//! and the linter itself where `promtool` is installed.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::Write,
    process::{Command, Stdio},
    time::Duration,
};

use crate::support::{
    MODEL,
    client::{Client, chat, chat_stream},
    cluster::{Cluster, NodePlan, Plan, Registry},
    until,
};

/// What dashboards made for vLLM ask for.
const DASHBOARD_NAMES: [&str; 20] = [
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
    "vllm:num_preemptions_total",
    "vllm:prefix_cache_queries_total",
    "vllm:prefix_cache_hits_total",
    "vllm:prompt_tokens_total",
    "vllm:generation_tokens_total",
    "vllm:spec_decode_num_draft_tokens_total",
    "vllm:spec_decode_num_accepted_tokens_total",
    "vllm:request_success_total",
    "vllm:request_prompt_tokens_bucket",
    "vllm:request_generation_tokens_bucket",
    "vllm:time_to_first_token_seconds_bucket",
    "vllm:time_per_output_token_seconds_bucket",
    "vllm:inter_token_latency_seconds_bucket",
    "vllm:request_time_per_output_token_seconds_bucket",
    "vllm:e2e_request_latency_seconds_bucket",
    "vllm:e2e_request_latency_seconds_sum",
    "vllm:e2e_request_latency_seconds_count",
];

#[tokio::test]
async fn metrics_have_the_names_of_dashboards_tell_the_truth_and_pass_a_linter() {
    let nodes = [NodePlan::named("n1")];
    let cluster = Cluster::start(Plan::new(Registry::Static, &nodes)).await;
    let (client, url) = (Client::new(), format!("{}/v1/chat/completions", cluster.edge()));

    // long enough to fill blocks of the prefix cache, so that its second turn finds them
    let long = "Tell me of the sea and the wind. ".repeat(8);
    let (mut prompt_tokens, mut tokens) = (0, 0);
    for body in [chat(&long, 6), chat(&long, 6), chat("Say hello.", 4)] {
        let answer = client.post(&url, &body).await.unwrap();
        assert_eq!(answer.status, 200, "{}", answer.body);
        prompt_tokens += answer.body["usage"]["prompt_tokens"].as_u64().unwrap();
        tokens += answer.body["usage"]["completion_tokens"].as_u64().unwrap();
    }
    let streamed = client.stream(&url, &chat_stream("Count to three.", 5), |_| {}).await;
    tokens += streamed.tokens;
    assert_eq!(client.post(&url, &serde_json::json!({"model": MODEL, "messages": 7})).await.unwrap().status, 400);

    // a stream's record is written after its last byte
    let page = format!("{}/metrics", cluster.node("n1"));
    until("four requests are on record", Duration::from_secs(5), || async {
        Exposed::read(&client.text(&page).await).sum("vllm:e2e_request_latency_seconds_count") == 4.0
    })
    .await;
    let of_node = client.text(&page).await;
    let exposed = Exposed::read(&of_node);
    for name in DASHBOARD_NAMES {
        let series = exposed.series.iter().filter(|s| s.name == name).collect::<Vec<_>>();
        assert!(!series.is_empty(), "{name} is missing:\n{of_node}");
        let model = format!("model_name=\"{MODEL}\"");
        assert!(series.iter().all(|s| s.labels.contains(&model)), "{name} does not name its model: {series:?}");
    }
    assert_eq!(exposed.sum("vllm:generation_tokens_total"), tokens as f64);
    assert!(exposed.sum("vllm:prompt_tokens_total") > prompt_tokens as f64);
    assert_eq!(exposed.sum("vllm:prefix_cache_queries_total"), exposed.sum("vllm:prompt_tokens_total"));
    assert!(exposed.sum("vllm:prefix_cache_hits_total") >= 32.0, "{of_node}");
    assert_eq!(exposed.sum("vllm:request_success_total"), 4.0);
    assert_eq!(exposed.sum("vllm:request_generation_tokens_sum"), tokens as f64);
    assert_eq!(exposed.sum("vllm:inter_token_latency_seconds_count"), tokens as f64 - 4.0);

    let of_balancer = client.text(&format!("{}/metrics", cluster.admin())).await;
    for (who, text) in [("node", of_node), ("balancer", of_balancer)] {
        let problems = lint(&text);
        assert!(problems.is_empty(), "the {who}'s metrics:\n{}\n{text}", problems.join("\n"));
        promtool(who, &text);
    }
}

#[test]
fn the_linter_finds_what_is_wrong() {
    let wrong = [
        ("# TYPE a_total counter\na_total 1\n", "no help"),
        ("# HELP a b\n# TYPE a counter\na 1\n", "_total"),
        ("# HELP a_total b\n# TYPE a_total gauge\na_total 1\n", "_total"),
        ("# HELP aB b\n# TYPE aB gauge\naB 1\n", "snake_case"),
        ("# HELP a_milliseconds b\n# TYPE a_milliseconds gauge\na_milliseconds 1\n", "unit"),
        ("# HELP a_ms b\n# TYPE a_ms gauge\na_ms 1\n", "unit"),
        ("# HELP a_gauge b\n# TYPE a_gauge gauge\na_gauge 1\n", "type"),
        ("# HELP a_count b\n# TYPE a_count gauge\na_count 1\n", "suffix"),
        ("# HELP a b\n# TYPE a gauge\na 1\na 2\n", "twice"),
        ("# HELP a b\n# TYPE a gauge\na{le=\"1\"} 1\n", "'le'"),
        ("a 1\n", "no type"),
        (
            "# HELP h b\n# TYPE h histogram\nh_bucket{le=\"1\"} 3\nh_bucket{le=\"+Inf\"} 2\nh_sum 1\nh_count 2\n",
            "cumulative",
        ),
        ("# HELP h b\n# TYPE h histogram\nh_bucket{le=\"+Inf\"} 3\nh_sum 1\nh_count 2\n", "count"),
    ];
    for (text, word) in wrong {
        let problems = lint(text);
        assert!(problems.iter().any(|p| p.contains(word)), "{text}: {problems:?}");
    }
    let right = "# HELP h b\n# TYPE h histogram\nh_bucket{le=\"1\"} 1\nh_bucket{le=\"+Inf\"} 2\nh_sum 1\nh_count 2\n";
    assert_eq!(lint(right), Vec::<String>::new());
}

/// What a page of metrics says.
#[derive(Default)]
struct Exposed {
    helps: BTreeSet<String>,
    /// Type by family.
    types: BTreeMap<String, String>,
    series: Vec<Series>,
    problems: Vec<String>,
}

#[derive(Debug)]
struct Series {
    name: String,
    /// As they stand between the braces.
    labels: String,
    value: f64,
}

impl Exposed {
    /// Reads the text format, version 0.0.4.
    fn read(text: &str) -> Self {
        let mut all = Self::default();
        for line in text.lines().filter(|line| !line.is_empty()) {
            if let Some(help) = line.strip_prefix("# HELP ") {
                let family = help.split(' ').next().unwrap_or_default().to_owned();
                let is_first = all.helps.insert(family);
                all.note(is_first && help.contains(' '), "help twice or empty", line);
            } else if let Some((family, kind)) = line.strip_prefix("# TYPE ").and_then(|rest| rest.split_once(' ')) {
                let before = all.types.insert(family.to_owned(), kind.to_owned());
                all.note(before.is_none(), "a family stands twice", line);
            } else {
                match series(line) {
                    Some(series) => all.series.push(series),
                    None => all.problems.push(format!("not a series: {line}")),
                }
            }
        }
        all
    }

    fn note(&mut self, holds: bool, problem: &str, line: &str) {
        if !holds {
            self.problems.push(format!("{problem}: {line}"));
        }
    }

    fn sum(&self, name: &str) -> f64 {
        self.series.iter().filter(|s| s.name == name).map(|s| s.value).sum()
    }

    /// A series' family: its name, or for a part of a histogram what is left without the part.
    fn family<'a>(&self, name: &'a str) -> Option<&'a str> {
        let parts = ["", "_bucket", "_sum", "_count"].into_iter().filter_map(|part| name.strip_suffix(part));
        parts.into_iter().find(|family| self.types.contains_key(*family))
    }
}

/// No label of ours has a brace or a blank in its value.
fn series(line: &str) -> Option<Series> {
    let (named, value) = line.rsplit_once(' ')?;
    let (name, labels) = match named.split_once('{') {
        Some((name, labels)) => (name, labels.strip_suffix('}')?),
        None => (named, ""),
    };
    Some(Series { name: name.to_owned(), labels: labels.to_owned(), value: value.parse().ok()? })
}

/// The rules of Prometheus' linter (`promlint` in client_golang, and its page on naming), but for the colon: that is kept for recording
/// rules, and `vllm:` is how users' dashboards spell these names.
fn lint(text: &str) -> Vec<String> {
    let mut exposed = Exposed::read(text);
    let mut problems = std::mem::take(&mut exposed.problems);
    let mut seen = BTreeSet::new();
    for Series { name, labels, .. } in &exposed.series {
        if !seen.insert((name, labels)) {
            problems.push(format!("{name}{{{labels}}} stands twice"));
        }
        match exposed.family(name) {
            None => problems.push(format!("{name} has no type")),
            Some(family) if exposed.types[family] != "histogram" && labels.split(',').any(|l| l.starts_with("le=")) => {
                problems.push(format!("{name} is no histogram and has a label 'le'"));
            }
            Some(_) => {}
        }
    }
    for (family, kind) in &exposed.types {
        if !exposed.helps.contains(family) {
            problems.push(format!("{family} has no help"));
        }
        problems.extend(lint_name(family, kind));
        if kind == "histogram" {
            problems.extend(lint_histogram(family, &exposed));
        }
    }
    problems
}

fn lint_name(family: &str, kind: &str) -> Vec<String> {
    const UNITS: [&str; 22] = [
        "s",
        "sec",
        "ms",
        "us",
        "ns",
        "milliseconds",
        "microseconds",
        "nanoseconds",
        "minutes",
        "hours",
        "days",
        "b",
        "kb",
        "mb",
        "gb",
        "kib",
        "mib",
        "gib",
        "kilobytes",
        "megabytes",
        "gigabytes",
        "percent",
    ];
    let name = family.strip_prefix("vllm:").unwrap_or(family);
    let mut problems = Vec::new();
    let mut note = |broken: bool, problem: &str| {
        if broken {
            problems.push(format!("{family} ({kind}): {problem}"));
        }
    };
    let is_snake = name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_');
    note(!is_snake, "names are snake_case");
    note((kind == "counter") != name.ends_with("_total"), "counters, and only they, end with _total");
    let is_part = ["_bucket", "_sum", "_count"].iter().any(|part| name.ends_with(part));
    note(is_part, "a suffix of histograms' parts");
    note(name.split('_').any(|word| UNITS.contains(&word)), "a unit that is no base unit, or an abbreviation");
    note(name.split('_').any(|w| ["gauge", "counter", "histogram"].contains(&w)), "the type in the name");
    problems
}

fn lint_histogram(family: &str, exposed: &Exposed) -> Vec<String> {
    let mut problems = Vec::new();
    // buckets by the labels without 'le', in the order of the page
    let mut buckets: BTreeMap<String, Vec<f64>> = BTreeMap::new();
    for bucket in exposed.series.iter().filter(|s| s.name == format!("{family}_bucket")) {
        let others: Vec<&str> = bucket.labels.split(',').filter(|l| !l.starts_with("le=") && !l.is_empty()).collect();
        buckets.entry(others.join(",")).or_default().push(bucket.value);
    }
    for (labels, counts) in buckets {
        if !counts.is_sorted() {
            problems.push(format!("{family}{{{labels}}}: the buckets are not cumulative"));
        }
        let count = exposed.series.iter().find(|s| s.name == format!("{family}_count") && s.labels == labels);
        if count.map(|s| s.value) != counts.last().copied() {
            problems.push(format!("{family}{{{labels}}}: the last bucket is not the count"));
        }
    }
    problems
}

/// The linter itself, where it is installed.
fn promtool(who: &str, text: &str) {
    let mut command = Command::new("promtool");
    command.args(["check", "metrics"]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let Ok(mut child) = command.spawn() else {
        return println!("promtool is not installed here, so only the rules above were applied to the {who}'s metrics");
    };
    // the one rule that these names break on purpose
    let text = text.replace("vllm:", "vllm_");
    child.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let said = [output.stdout, output.stderr].concat();
    assert!(output.status.success(), "promtool on the {who}'s metrics:\n{}", String::from_utf8_lossy(&said));
    println!("promtool finds nothing wrong with the {who}'s metrics");
}
