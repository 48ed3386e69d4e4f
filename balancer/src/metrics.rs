//! What is counted. Labels come from closed sets: paths of the API, models that are served, reasons that this crate names.

use prometheus::{
    Encoder, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry, TextEncoder,
};

use crate::{config::BalancerConfig, pool::Snapshot};

/// Seconds; from a cached answer at the edge to a long generation.
const DURATIONS_S: [f64; 14] = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 60.0, 300.0];

/// All metrics of one balancer, in a registry of their own, so that two balancers in one process do not mix.
pub(crate) struct Metrics {
    registry: Registry,
    /// Terminal records by path, model, status and reason.
    pub(crate) requests: IntCounterVec,
    /// Whole duration by path.
    pub(crate) duration: HistogramVec,
    /// Until the first token reached the client, by path.
    pub(crate) first_token: HistogramVec,
    /// Attempts given up before the client had anything, by what went wrong.
    pub(crate) retries: IntCounterVec,
    /// Streams carried on by another node, by what went wrong.
    pub(crate) resumes: IntCounterVec,
    /// Requests open now.
    pub(crate) open_requests: IntGauge,
    /// Streams open now.
    pub(crate) open_streams: IntGauge,
    /// Connections closed before a request, by reason.
    pub(crate) refused: IntCounterVec,
    /// Readings of the configuration while running, by what became of them.
    pub(crate) reloads: IntCounterVec,
    /// Generations by what the cache had of them, where there is one.
    pub(crate) cache_requests: IntCounterVec,
    cache_answers: IntGauge,
    cache_bytes: IntGauge,
    sessions: IntGauge,
    sessions_bytes: IntGauge,
    certificates: IntGaugeVec,
    /// Audit records taken, by event.
    pub(crate) audit_records: IntCounterVec,
    /// Audit records that could not be kept.
    pub(crate) audit_lost: IntCounter,
    /// Audit records that are in the log and went to no receiver beside it, by which.
    pub(crate) audit_export_lost: IntCounterVec,
    /// Attempts to write the audit log that failed.
    pub(crate) audit_failures: IntCounter,
    /// 1 while the audit log cannot be written.
    pub(crate) audit_failing: IntGauge,
    /// Number of the newest audit record.
    pub(crate) audit_sequence: IntGauge,
    /// Requests refused because somebody has used what it may, by whose limit and of what.
    pub(crate) limited: IntCounterVec,
    /// Keys, tenants and addresses whose use is counted.
    pub(crate) limit_tabs: IntGauge,
    /// Requests that were to be counted for all balancers together, by what became of it.
    pub(crate) shared_calls: IntCounterVec,
    /// Whether they can be.
    pub(crate) shared_up: IntGauge,
    members: IntGaugeVec,
    panics: IntGaugeVec,
}

impl Metrics {
    pub(crate) fn new() -> Self {
        let registry = Registry::new();
        let r = &registry;
        Self {
            requests: counters(r, "requests_total", "requests ended", &["path", "model", "status", "reason"]),
            duration: histograms(r, "request_duration_seconds", "from a request's head to its end"),
            first_token: histograms(r, "time_to_first_token_seconds", "from a request's head to its first token"),
            retries: counters(r, "retries_total", "attempts moved on before the client had anything", &["reason"]),
            resumes: counters(r, "resumes_total", "streams taken up by another node", &["reason"]),
            open_requests: gauge(r, "open_requests", "requests open"),
            open_streams: gauge(r, "open_streams", "streams open"),
            refused: counters(r, "connections_refused_total", "connections closed before a request", &["reason"]),
            reloads: counters(r, "reloads_total", "readings of the configuration while running", &["outcome"]),
            cache_requests: counters(
                r,
                "cache_requests_total",
                "generations by what the cache had of them",
                &["outcome"],
            ),
            cache_answers: gauges(r, "cache_answers", "answers in the cache", &[]).with_label_values::<&str>(&[]),
            cache_bytes: gauges(r, "cache_bytes", "what they take", &[]).with_label_values::<&str>(&[]),
            sessions: gauges(r, "sessions", "dialogues that are remembered", &[]).with_label_values::<&str>(&[]),
            sessions_bytes: gauges(r, "sessions_bytes", "what they take", &[]).with_label_values::<&str>(&[]),
            certificates: gauges(
                r,
                "certificate_not_after_seconds",
                "when a certificate of the edge ends, in Unix seconds",
                &["file"],
            ),
            audit_records: counters(r, "audit_records_total", "audit records taken", &["event"]),
            audit_lost: counter(r, "audit_lost_total", "audit records that could not be kept"),
            audit_export_lost: counters(
                r,
                "audit_export_lost_total",
                "audit records that did not go to a receiver",
                &["to"],
            ),
            audit_failures: counter(r, "audit_failures_total", "attempts to write the audit log that failed"),
            audit_failing: gauge(r, "audit_failing", "1 while the audit log cannot be written"),
            audit_sequence: gauge(r, "audit_sequence", "number of the newest audit record"),
            limited: counters(r, "rate_limited_total", "requests over a limit", &["scope", "kind"]),
            shared_calls: counters(r, "shared_limits_total", "requests counted for all balancers", &["outcome"]),
            shared_up: gauges(r, "shared_limits_up", "whether balancers count together", &[])
                .with_label_values::<&str>(&[]),
            limit_tabs: gauges(r, "rate_limit_entries", "keys, tenants and addresses counted", &[])
                .with_label_values::<&str>(&[]),
            members: gauges(r, "members", "members of the cluster", &["model", "state"]),
            panics: gauges(
                r,
                "pool_panic",
                "1 while too few members are ready and failed ones are asked too",
                &["model"],
            ),
            registry,
        }
    }

    /// The counter of connections refused for this reason.
    pub(crate) fn refused(&self, reason: &str) -> IntCounter {
        self.refused.with_label_values(&[reason])
    }

    /// Shows how many answers the cache has, and what they take.
    pub(crate) fn show_cache(&self, (answers, bytes): (usize, usize)) {
        self.cache_answers.set(answers as i64);
        self.cache_bytes.set(bytes as i64);
    }

    /// Shows how many dialogues are remembered, and what they take.
    pub(crate) fn show_sessions(&self, (dialogues, bytes): (usize, usize)) {
        self.sessions.set(dialogues as i64);
        self.sessions_bytes.set(bytes as i64);
    }

    /// Shows when the edge's certificates end.
    pub(crate) fn show_certificates(&self, config: &BalancerConfig) {
        self.certificates.reset();
        for (path, end) in config.tls.iter().flat_map(|tls| tls.certificates.ends()) {
            let end = i64::try_from(end.0).unwrap_or(i64::MAX);
            self.certificates.with_label_values(&[path.display().to_string()]).set(end);
        }
    }

    /// Shows how many members each model has in each state, and which pools ask failed ones.
    pub(crate) fn show_members(&self, snapshot: &Snapshot) {
        self.members.reset();
        for member in &snapshot.report.members {
            self.members.with_label_values(&[member.model.as_str(), member.state.as_str()]).inc();
        }
        self.panics.reset();
        for (model, pool) in &snapshot.models {
            self.panics.with_label_values(&[model.as_str()]).set(pool.is_panicking().into());
        }
    }

    /// The text that Prometheus reads.
    pub(crate) fn render(&self) -> Vec<u8> {
        let mut text = Vec::new();
        let _ = TextEncoder::new().encode(&self.registry.gather(), &mut text); // writing to memory does not fail
        text
    }
}

/// Of the text that Prometheus reads.
pub(crate) const MEDIA_TYPE: &str = "text/plain; version=0.0.4";

const CONSTANT: &str = "names and labels are constant and well formed";

fn opts(name: &str, help: &str) -> Opts {
    Opts::new(name, help).namespace("tidegate")
}

fn counters(registry: &Registry, name: &str, help: &str, labels: &[&str]) -> IntCounterVec {
    let metric = IntCounterVec::new(opts(name, help), labels).expect(CONSTANT);
    registry.register(Box::new(metric.clone())).expect(CONSTANT);
    metric
}

fn counter(registry: &Registry, name: &str, help: &str) -> IntCounter {
    counters(registry, name, help, &[]).with_label_values::<&str>(&[])
}

fn gauge(registry: &Registry, name: &str, help: &str) -> IntGauge {
    gauges(registry, name, help, &[]).with_label_values::<&str>(&[])
}

fn gauges(registry: &Registry, name: &str, help: &str, labels: &[&str]) -> IntGaugeVec {
    let metric = IntGaugeVec::new(opts(name, help), labels).expect(CONSTANT);
    registry.register(Box::new(metric.clone())).expect(CONSTANT);
    metric
}

fn histograms(registry: &Registry, name: &str, help: &str) -> HistogramVec {
    let opts = HistogramOpts::from(opts(name, help)).buckets(DURATIONS_S.to_vec());
    let metric = HistogramVec::new(opts, &["path"]).expect(CONSTANT);
    registry.register(Box::new(metric.clone())).expect(CONSTANT);
    metric
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_what_dashboards_rely_on() {
        let metrics = Metrics::new();
        metrics.requests.with_label_values(&["/health", "", "200", "ok"]).inc();
        metrics.duration.with_label_values(&["/health"]).observe(0.001);
        metrics.first_token.with_label_values(&["/v1/chat"]).observe(0.001);
        metrics.retries.with_label_values(&["connect"]).inc();
        metrics.resumes.with_label_values(&["ended"]).inc();
        metrics.refused("allowlist").inc();
        metrics.shared_calls.with_label_values(&["granted"]).inc();
        metrics.limited.with_label_values(&["key", "tokens"]).inc();
        metrics.reloads.with_label_values(&["applied"]).inc();
        metrics.audit_records.with_label_values(&["request"]).inc();
        metrics.audit_export_lost.with_label_values(&["syslog"]).inc();
        let text = String::from_utf8(metrics.render()).unwrap();
        let mut names: Vec<&str> = text.lines().filter_map(|l| l.strip_prefix("# TYPE ")?.split(' ').next()).collect();
        names.sort_unstable();
        insta::assert_snapshot!(names.join("\n"), @r"
        tidegate_audit_export_lost_total
        tidegate_audit_failing
        tidegate_audit_failures_total
        tidegate_audit_lost_total
        tidegate_audit_records_total
        tidegate_audit_sequence
        tidegate_cache_answers
        tidegate_cache_bytes
        tidegate_connections_refused_total
        tidegate_open_requests
        tidegate_open_streams
        tidegate_rate_limit_entries
        tidegate_rate_limited_total
        tidegate_reloads_total
        tidegate_request_duration_seconds
        tidegate_requests_total
        tidegate_resumes_total
        tidegate_retries_total
        tidegate_sessions
        tidegate_sessions_bytes
        tidegate_shared_limits_total
        tidegate_shared_limits_up
        tidegate_time_to_first_token_seconds
        ");
    }
}
