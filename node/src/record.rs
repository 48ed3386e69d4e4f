//! What is kept of each request: one log line and its share of the metrics, exactly once, also when the client left.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, atomic::Ordering::Relaxed},
    time::{Duration, Instant, SystemTime},
};

use prometheus::{
    Encoder, GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounterVec, Opts, Registry, TextEncoder,
    proto::MetricFamily,
};
use tidegate_common::{
    contract::{ApiError, ErrorKind},
    ids::RequestId,
    trace::{Context, KeyValue, Span, Tracer, operation},
};
use tracing::info;

use crate::{engine::Stats, sched::Class, served::Models, stop::Finish};

/// How a generation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// With its last token.
    Finished,
    /// Before it began.
    Refused,
    /// The client left.
    ClientLeft,
    /// The node let go of it.
    HandedOver,
    /// Its deadline passed.
    TimedOut,
    /// Its deadline passed before its first step.
    TimedOutWaiting,
    /// The engine thread is gone.
    EngineLost,
}

impl Outcome {
    fn word(self) -> &'static str {
        match self {
            Self::Finished => "finished",
            Self::Refused => "refused",
            Self::ClientLeft => "client_left",
            Self::HandedOver => "handed_over",
            Self::TimedOut => "timed_out",
            Self::TimedOutWaiting => "timed_out_waiting",
            Self::EngineLost => "engine_lost",
        }
    }

    /// Whether its deadline passed, so that no other node may go on with it.
    pub fn is_late(self) -> bool {
        matches!(self, Self::TimedOut | Self::TimedOutWaiting)
    }

    /// What a client is told that came without a balancer.
    pub fn error(self) -> ApiError {
        match self {
            Self::TimedOut => ApiError::new(
                ErrorKind::DeadlineExceeded,
                "timed_out",
                "the request took longer than node.request_timeout allows",
            ),
            Self::TimedOutWaiting => ApiError::new(
                ErrorKind::DeadlineExceeded,
                "queue_timeout",
                "the request waited in the queue for as long as node.request_timeout or its own deadline allows; the node is too busy for it",
            ),
            Self::HandedOver => {
                ApiError::new(ErrorKind::Unavailable, "draining", "the node was drained before the answer was whole")
            }
            _ => ApiError::new(ErrorKind::Internal, "engine_lost", "the node failed before the answer was whole"),
        }
    }
}

/// The label that says which model.
const MODEL: &str = "model_name";

/// The reason of answers that were let go of.
const ABORT: &str = "abort";

/// The reason of answers that a fault of ours ended.
const ERROR: &str = "error";

/// Tokens; from a word to a long context.
const TOKEN_COUNTS: [f64; 16] = [
    1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0, 5000.0, 10_000.0, 20_000.0, 50_000.0,
    100_000.0,
];

/// The node's metrics, under the names that dashboards for vLLM already have.
#[derive(Clone)]
pub struct Metrics {
    registry: Registry,
    /// Readings of the certificates while running, by `applied` or `refused`.
    pub reloads: IntCounterVec,
    requests: IntCounterVec,
    time_to_first_token: HistogramVec,
    /// Under the old name and the new one.
    between_tokens: [HistogramVec; 2],
    time_per_token: HistogramVec,
    latency: HistogramVec,
    prompt_tokens: HistogramVec,
    generation_tokens: HistogramVec,
    ends: IntCounterVec,
    /// The default model's name, for requests that do not come so far as to have a model.
    model: String,
}

impl Metrics {
    /// Metrics of one node; the model's name is a label on all of them, and only ever the name of a model that is served here.
    ///
    /// # Errors
    /// Never in practice: when two metrics had one name.
    pub fn new<'a>(models: impl IntoIterator<Item = &'a str>) -> Result<Self, prometheus::Error> {
        let registry = Registry::new();
        let histogram = |name: &str, help: &str, buckets: &[f64]| -> Result<HistogramVec, prometheus::Error> {
            let opts = HistogramOpts::new(name, help).buckets(buckets.to_vec());
            let histogram = HistogramVec::new(opts, &[MODEL])?;
            registry.register(Box::new(histogram.clone()))?;
            Ok(histogram)
        };
        let long = [0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0];
        let short = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5];
        let requests = IntCounterVec::new(
            Opts::new("tidegate_node_requests_total", "Requests by path, status and outcome."),
            &[MODEL, "path", "status", "outcome"],
        )?;
        registry.register(Box::new(requests.clone()))?;
        let ends = IntCounterVec::new(
            Opts::new("vllm:request_success_total", "Answers ended, by reason."),
            &[MODEL, "finished_reason"],
        )?;
        registry.register(Box::new(ends.clone()))?;
        let reloads = IntCounterVec::new(
            Opts::new("tidegate_node_reloads_total", "Readings of the certificates while running, by outcome."),
            &["outcome"],
        )?;
        registry.register(Box::new(reloads.clone()))?;
        let models: Vec<&str> = models.into_iter().collect();
        let metrics = Self {
            requests,
            ends,
            reloads,
            model: models.first().copied().unwrap_or_default().to_owned(),
            time_to_first_token: histogram(
                "vllm:time_to_first_token_seconds",
                "From a request's arrival to its first token.",
                &long,
            )?,
            between_tokens: [
                histogram("vllm:inter_token_latency_seconds", "From one token of an answer to the next.", &short)?,
                histogram(
                    "vllm:time_per_output_token_seconds",
                    "The same as vllm:inter_token_latency_seconds, under its older name.",
                    &short,
                )?,
            ],
            time_per_token: histogram(
                "vllm:request_time_per_output_token_seconds",
                "Mean time from one token of a request to the next.",
                &short,
            )?,
            prompt_tokens: histogram("vllm:request_prompt_tokens", "Prompt tokens of a request.", &TOKEN_COUNTS)?,
            generation_tokens: histogram(
                "vllm:request_generation_tokens",
                "Tokens generated for a request.",
                &TOKEN_COUNTS,
            )?,
            latency: histogram("vllm:e2e_request_latency_seconds", "From a request's arrival to its end.", &long)?,
            registry,
        };
        models.into_iter().for_each(|model| metrics.begin(model));
        Ok(metrics)
    }

    /// A rate needs a zero to rise from.
    fn begin(&self, model: &str) {
        for reason in ["stop", "length", ABORT, ERROR] {
            drop(self.ends.get_metric_with_label_values(&[model, reason]));
        }
        let histograms = [&self.time_to_first_token, &self.time_per_token, &self.latency, &self.prompt_tokens];
        for histogram in histograms.into_iter().chain(&self.between_tokens).chain([&self.generation_tokens]) {
            drop(histogram.get_metric_with_label_values(&[model]));
        }
    }

    fn between_tokens_of(&self, model: &str) -> [Histogram; 2] {
        self.between_tokens.each_ref().map(|histograms| histograms.with_label_values(&[model]))
    }

    /// All metrics in Prometheus' text format.
    pub fn render(&self, models: &Models) -> String {
        let mut out = Vec::new();
        let encoded = TextEncoder::new().encode(&self.registry.gather(), &mut out);
        debug_assert!(encoded.is_ok(), "metrics can always be written to memory");
        let _ = TextEncoder::new().encode(&engine_families(models), &mut out);
        String::from_utf8_lossy(&out).into_owned()
    }
}

/// The engines' own metrics, read when asked. A model's counters begin anew with each load.
fn engine_families(models: &Models) -> Vec<MetricFamily> {
    let mut families: BTreeMap<String, MetricFamily> = BTreeMap::new();
    models.for_each_ready(|model| {
        for mut family in engine_registry(model.engine.stats(), &model.name).gather() {
            match families.get_mut(family.name()) {
                // one family of this name, with the metrics of all models
                Some(known) => known.mut_metric().extend(family.take_metric()),
                None => drop(families.insert(family.name().to_owned(), family)),
            }
        }
    });
    families.into_values().collect()
}

fn engine_registry(stats: &Stats, model: &str) -> Registry {
    let labels = [(MODEL.to_owned(), model.to_owned())].into();
    let registry = Registry::new_custom(None, Some(labels)).unwrap_or_default();
    let gauges = [
        ("vllm:num_requests_running", "Sequences in the batch.", stats.running.load(Relaxed) as f64),
        ("vllm:num_requests_waiting", "Sequences that wait for a place.", stats.waiting.load(Relaxed) as f64),
        ("vllm:kv_cache_usage_perc", "Share of the KV blocks in use, 0 to 1.", stats.kv_usage()),
    ];
    for (name, help, value) in gauges {
        if let Ok(gauge) = prometheus::Gauge::new(name, help) {
            gauge.set(value);
            let _ = registry.register(Box::new(gauge));
        }
    }
    let counters = [
        ("vllm:prompt_tokens_total", "Prompt tokens taken.", &stats.prompt_tokens),
        ("vllm:generation_tokens_total", "Tokens generated.", &stats.generated_tokens),
        ("vllm:prefix_cache_queries_total", "Tokens looked up in the prefix cache.", &stats.tokens_looked_up),
        ("vllm:prefix_cache_hits_total", "Tokens found in the prefix cache.", &stats.prompt_tokens_cached),
        (
            "vllm:num_preemptions_total",
            "Sequences put back, for want of KV blocks or for another tenant's share.",
            &stats.preemptions,
        ),
        (
            "vllm:spec_decode_num_draft_tokens_total",
            "Guesses at next tokens that were computed.",
            &stats.speculated_tokens,
        ),
        (
            "vllm:spec_decode_num_accepted_tokens_total",
            "Guesses at next tokens that came true.",
            &stats.accepted_tokens,
        ),
        ("tidegate_node_steps_total", "Steps finished.", &stats.steps),
    ];
    for (name, help, value) in counters {
        if let Ok(counter) = prometheus::IntCounter::new(name, help) {
            counter.inc_by(value.load(Relaxed));
            let _ = registry.register(Box::new(counter));
        }
    }
    let _ = registry.register(Box::new(stats.queue_time.clone()));
    let _ = registry.register(Box::new(waiting_by_class(stats)));
    let _ = registry.register(Box::new(preemptions_by_reason(stats)));
    registry
}

fn waiting_by_class(stats: &Stats) -> GaugeVec {
    let opts = Opts::new("tidegate_node_waiting", "Sequences that wait for a place, by priority class.");
    let gauges = GaugeVec::new(opts, &["priority"]).expect("the name is valid");
    for (class, waiting) in Class::ALL.into_iter().zip(&stats.waiting_by_class) {
        gauges.with_label_values(&[class.word()]).set(waiting.load(Relaxed) as f64);
    }
    gauges
}

fn preemptions_by_reason(stats: &Stats) -> IntCounterVec {
    let opts = Opts::new(
        "tidegate_node_preemptions_total",
        "Sequences put back: 'blocks' for want of KV blocks, 'share' for a tenant with fewer places.",
    );
    let counters = IntCounterVec::new(opts, &["reason"]).expect("the name is valid");
    let (all, share) = (stats.preemptions.load(Relaxed), stats.preemptions_for_share.load(Relaxed));
    counters.with_label_values(&["share"]).inc_by(share);
    counters.with_label_values(&["blocks"]).inc_by(all.saturating_sub(share));
    counters
}

/// A request's place in a trace.
#[derive(Debug)]
pub struct Traced {
    tracer: Arc<Tracer>,
    context: Context,
}

impl Traced {
    /// This place, exported by that one.
    pub fn new(tracer: &Arc<Tracer>, context: Context) -> Self {
        Self { tracer: Arc::clone(tracer), context }
    }
}

/// One request's record; written when it is dropped.
pub struct Record {
    metrics: Metrics,
    model: String,
    /// [`Metrics::between_tokens`] of the model, found once and not for each token.
    between_tokens: [Histogram; 2],
    path: String,
    id: RequestId,
    arrived: Instant,
    traced: Option<Traced>,
    /// When its first step began.
    begun: Option<Instant>,
    first_token: Option<Instant>,
    /// When each choice's newest token came.
    newest_tokens: HashMap<u32, Instant>,
    prompt_tokens: usize,
    tokens: u64,
    stream: bool,
    status: u16,
    code: Option<&'static str>,
    outcome: Outcome,
}

impl Record {
    /// A request has arrived.
    pub fn begin(metrics: &Metrics, path: &str, id: &RequestId, arrived: Instant) -> Self {
        Self {
            metrics: metrics.clone(),
            model: metrics.model.clone(),
            between_tokens: metrics.between_tokens_of(&metrics.model),
            path: path.to_owned(),
            id: id.clone(),
            arrived,
            traced: None,
            begun: None,
            first_token: None,
            newest_tokens: HashMap::new(),
            prompt_tokens: 0,
            tokens: 0,
            stream: false,
            status: 200,
            code: None,
            outcome: Outcome::ClientLeft,
        }
    }

    /// It has this place in a trace.
    #[must_use]
    pub fn traced(mut self, traced: Option<Traced>) -> Self {
        self.traced = traced;
        self
    }

    /// Its first step began then, as far as that is known.
    pub fn begun(&mut self, at: Option<Instant>) {
        self.begun = at;
    }

    /// Whether it has any token.
    pub fn has_tokens(&self) -> bool {
        self.first_token.is_some()
    }

    /// It is refused.
    pub fn refused(&mut self, error: &ApiError) {
        self.answered(error);
        self.outcome = Outcome::Refused;
    }

    /// Its answer is this error.
    pub fn answered(&mut self, error: &ApiError) {
        self.status = error.status();
        self.code = Some(error.code);
    }

    /// It is for this model, which is served here.
    pub fn of_model(&mut self, model: &str) {
        model.clone_into(&mut self.model);
        self.between_tokens = self.metrics.between_tokens_of(model);
    }

    /// It runs or waits.
    pub fn admitted(&mut self, prompt_tokens: usize, stream: bool) {
        self.prompt_tokens = prompt_tokens;
        self.stream = stream;
    }

    /// A token of this choice has come.
    pub fn token(&mut self, choice: u32) {
        let now = Instant::now();
        self.first_token.get_or_insert(now);
        self.tokens += 1;
        if let Some(before) = self.newest_tokens.insert(choice, now) {
            let between = (now - before).as_secs_f64();
            self.between_tokens.iter().for_each(|histogram| histogram.observe(between));
        }
    }

    /// A choice has come to its own end.
    pub fn choice_ended(&mut self, finish: Finish) {
        let reason = match finish {
            Finish::Stop => "stop",
            Finish::Length => "length",
        };
        self.metrics.ends.with_label_values(&[self.model.as_str(), reason]).inc();
    }

    /// It has ended.
    pub fn end(&mut self, outcome: Outcome) {
        self.outcome = outcome;
    }

    /// The request and its parts as spans: in the queue, until its first token, and from there to the end.
    fn export(&self, Traced { tracer, context }: &Traced, total: Duration) {
        let ended = SystemTime::now();
        let time = |at: Instant| ended.checked_sub(at.elapsed()).unwrap_or(ended);
        let began = ended.checked_sub(total).unwrap_or(ended);
        let parts = [
            ("queue", Some(began), self.begun.map(time)),
            ("prefill", self.begun.map(time), self.first_token.map(time)),
            ("decode", self.first_token.map(time), Some(ended)),
        ];
        for (name, from, to) in parts {
            if let (Some(from), Some(to)) = (from, to) {
                tracer.export(context, Span::part(name, context.span, from, to));
            }
        }
        let operation = operation(&self.path);
        let name = operation.map_or_else(|| self.path.clone(), |operation| format!("{operation} {}", self.model));
        let mut whole = Span::request(name, context, began, ended);
        whole.attributes = self.attributes(operation);
        let is_fault = self.status >= 500 || self.outcome == Outcome::EngineLost || self.outcome.is_late();
        whole.error = is_fault.then(|| self.code.unwrap_or(self.outcome.word()).into());
        tracer.export(context, whole);
    }

    fn attributes(&self, operation: Option<&'static str>) -> Vec<KeyValue> {
        let whole = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
        let mut all = vec![
            KeyValue::new("http.route", self.path.clone()),
            KeyValue::new("http.response.status_code", i64::from(self.status)),
            KeyValue::new("tidegate.request_id", self.id.to_string()),
            KeyValue::new("tidegate.outcome", self.outcome.word()),
            KeyValue::new("gen_ai.provider.name", "tidegate"),
            KeyValue::new("gen_ai.request.model", self.model.clone()),
            KeyValue::new("gen_ai.usage.input_tokens", whole(self.prompt_tokens as u64)),
            KeyValue::new("gen_ai.usage.output_tokens", whole(self.tokens)),
        ];
        all.extend(operation.map(|operation| KeyValue::new("gen_ai.operation.name", operation)));
        let first = self.first_token.map(|at| (at - self.arrived).as_secs_f64());
        all.extend(first.map(|seconds| KeyValue::new("gen_ai.response.time_to_first_chunk", seconds)));
        all
    }

    fn observe(&self, total: Duration) {
        let (m, model) = (&self.metrics, self.model.as_str());
        let labels = [model, self.path.as_str(), &self.status.to_string(), self.outcome.word()];
        m.requests.with_label_values(&labels).inc();
        match self.outcome {
            Outcome::Finished | Outcome::Refused => {}
            Outcome::EngineLost => m.ends.with_label_values(&[model, ERROR]).inc(),
            Outcome::ClientLeft | Outcome::HandedOver | Outcome::TimedOut | Outcome::TimedOutWaiting => {
                m.ends.with_label_values(&[model, ABORT]).inc();
            }
        }
        let Some(first) = self.first_token else { return };
        let observe = |histogram: &HistogramVec, value: f64| histogram.with_label_values(&[model]).observe(value);
        observe(&m.prompt_tokens, self.prompt_tokens as f64);
        observe(&m.generation_tokens, self.tokens as f64);
        observe(&m.time_to_first_token, (first - self.arrived).as_secs_f64());
        observe(&m.latency, total.as_secs_f64());
        if self.tokens > 1 {
            observe(&m.time_per_token, first.elapsed().as_secs_f64() / (self.tokens - 1) as f64);
        }
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        let total = self.arrived.elapsed();
        self.observe(total);
        if let Some(traced) = self.traced.as_ref().filter(|traced| traced.context.is_sampled) {
            self.export(traced, total);
        }
        info!(
            request = %self.id,
            model = self.model,
            path = self.path,
            status = self.status,
            outcome = self.outcome.word(),
            error = self.code,
            stream = self.stream,
            prompt_tokens = self.prompt_tokens,
            tokens = self.tokens,
            ttft_ms = self.first_token.map(|t| (t - self.arrived).as_millis() as u64),
            total_ms = total.as_millis() as u64,
            "request"
        );
    }
}
