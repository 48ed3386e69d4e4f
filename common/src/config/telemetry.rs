//! `[telemetry]`: where traces and audit records are exported to, by OTLP.

use std::time::Duration;

use http::Uri;

use super::Reader;

/// The checked section.
#[derive(Debug, Clone)]
pub struct TelemetryConfig {
    /// Address of a collector that speaks OTLP over HTTP, without a path's end; none exports nothing.
    pub otlp_endpoint: Option<String>,
    /// Whether requests are exported as traces.
    pub traces: bool,
    /// Whether the balancer's audit records are exported as logs.
    pub logs: bool,
    /// Which part of new traces is exported, 0 to 1. A client that brings a trace has decided for itself.
    pub sampling: f64,
    /// `service.name` of what is exported.
    pub service_name: String,
    /// Bound of one export.
    pub timeout: Duration,
}

impl TelemetryConfig {
    pub(super) fn read(r: &Reader<'_>) -> Self {
        let endpoint = r.get::<String>("otlp_endpoint");
        if endpoint.is_none() && r.is_present() && !r.has("otlp_endpoint") {
            r.problem(
                "otlp_endpoint",
                "is missing",
                "name a collector, such as \"http://127.0.0.1:4318\", or remove the section",
            );
        }
        if endpoint.as_ref().is_some_and(|endpoint| !is_http(endpoint)) {
            let fix = "give the address of a collector's OTLP over HTTP, such as \"http://127.0.0.1:4318\"";
            r.problem("otlp_endpoint", "is no address of HTTP", fix);
        }
        let sampling = r.get_or("sampling", 1.0);
        if !(0.0..=1.0).contains(&sampling) {
            r.problem("sampling", format!("{sampling} is outside 0 to 1"), "give a part of all, such as 0.1");
        }
        Self {
            otlp_endpoint: endpoint.map(|endpoint| endpoint.trim_end_matches('/').to_owned()),
            traces: r.get_or("traces", true),
            logs: r.get_or("logs", false),
            sampling,
            service_name: r.get_or("service_name", "tidegate".to_owned()),
            timeout: r.duration_or("timeout", Duration::from_secs(5)),
        }
    }
}

fn is_http(endpoint: &str) -> bool {
    endpoint
        .parse::<Uri>()
        .is_ok_and(|uri| uri.authority().is_some() && matches!(uri.scheme_str(), Some("http" | "https")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Raw;

    #[test]
    fn what_cannot_be_exported_to_is_told() {
        let read = |text: &str| Raw::from_toml(text, "t").unwrap().check(TelemetryConfig::read);
        let paths = |text: &str| read(text).unwrap_err().0.into_iter().map(|p| p.path).collect::<Vec<_>>();
        assert_eq!(paths("sampling = 2"), ["otlp_endpoint", "sampling"]);
        assert_eq!(paths("otlp_endpoint = \"127.0.0.1:4318\""), ["otlp_endpoint"]);
        assert!(
            Raw::empty().check(|r| TelemetryConfig::read(&r.section("telemetry"))).unwrap().otlp_endpoint.is_none()
        );
        let config = read("otlp_endpoint = \"http://localhost:4318/\"").unwrap();
        assert_eq!(config.otlp_endpoint.as_deref(), Some("http://localhost:4318"));
    }
}
