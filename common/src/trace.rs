//! OpenTelemetry: where a request's time went, from client to node and back, exported by OTLP over HTTP.
//!
//! A request keeps plain values while it runs and becomes spans at its end, so a request that is not sampled costs a few numbers, and none
//! where `[telemetry]` is not configured. The context crosses processes as W3C Trace Context has it
//! (<https://www.w3.org/TR/trace-context/>); attributes are named by the conventions for HTTP and `gen_ai`
//! (<https://opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-spans/>).

use std::{borrow::Cow, fmt, sync::Arc, time::SystemTime};

use opentelemetry::{
    InstrumentationScope, SpanId, TraceFlags, TraceId,
    trace::{Event, SpanContext, Status, TraceState},
};
use opentelemetry_otlp::{Protocol, SpanExporter, WithExportConfig};
use opentelemetry_sdk::{
    Resource,
    trace::{BatchSpanProcessor, SpanData, SpanEvents, SpanProcessor},
};
use tracing::warn;

pub use opentelemetry::{KeyValue, trace::SpanKind};

use crate::{config::TelemetryConfig, contract::paths};

/// Header of a request's place in a trace.
pub const TRACEPARENT: &str = "traceparent";
/// Header of what tracing systems say to themselves; it goes along untouched.
pub const TRACESTATE: &str = "tracestate";
/// Longest `tracestate` that goes along, in bytes; the specification asks for 512 at least.
const TRACESTATE_BYTES_MAX: usize = 2048;

/// Why nothing can be exported.
#[derive(Debug, thiserror::Error)]
#[error("telemetry.otlp_endpoint: {0}")]
pub struct TelemetryError(String);

impl TelemetryError {
    pub(crate) fn new(why: impl fmt::Display) -> Self {
        Self(why.to_string())
    }
}

/// Exports spans.
pub struct Tracer {
    processor: BatchSpanProcessor,
    scope: InstrumentationScope,
    sampling: f64,
}

impl fmt::Debug for Tracer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tracer").field("sampling", &self.sampling).finish_non_exhaustive()
    }
}

/// A request's place in a trace, and its own span there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Context {
    /// The trace, never 0.
    pub trace: u128,
    /// The request's own span in this process, never 0.
    pub span: u64,
    /// The span it came from.
    pub parent: Option<u64>,
    /// Whether anybody wants to see it.
    pub is_sampled: bool,
    state: Option<Box<str>>,
}

impl Context {
    /// Of a request that came with these headers, when the first is well formed.
    pub fn of_headers(traceparent: &str, tracestate: Option<&str>) -> Option<Self> {
        let (trace, parent, is_sampled) = parse(traceparent)?;
        let is_fit = |state: &&str| state.len() <= TRACESTATE_BYTES_MAX && state.parse::<TraceState>().is_ok();
        let state = tracestate.filter(is_fit).map(Into::into);
        Some(Self { trace, span: new_span(), parent: Some(parent), is_sampled, state })
    }

    /// The header for what this request asks of others, with a span for that.
    pub fn traceparent(&self, span: u64) -> String {
        format!("00-{:032x}-{span:016x}-{:02x}", self.trace, u8::from(self.is_sampled))
    }

    /// The header that goes along.
    pub fn tracestate(&self) -> Option<&str> {
        self.state.as_deref()
    }
}

/// A number for a span.
pub fn new_span() -> u64 {
    rand::random::<u64>().max(1)
}

/// Trace, span and whether it is sampled, of version 00, or as much of a later version as is known of it.
fn parse(header: &str) -> Option<(u128, u64, bool)> {
    let mut parts = header.split('-');
    let (version, trace, span, flags) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
    let is_hex = |text: &str, length| {
        text.len() == length && text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
    };
    let is_whole = is_hex(version, 2) && is_hex(trace, 32) && is_hex(span, 16) && is_hex(flags, 2);
    if !is_whole || version == "ff" || (version == "00" && parts.next().is_some()) {
        return None;
    }
    let trace = u128::from_str_radix(trace, 16).ok().filter(|trace| *trace != 0)?;
    let span = u64::from_str_radix(span, 16).ok().filter(|span| *span != 0)?;
    Some((trace, span, u8::from_str_radix(flags, 16).ok()? & 1 == 1))
}

/// One span, finished.
#[derive(Debug)]
pub struct Span {
    /// What was done.
    pub name: Cow<'static, str>,
    /// Which side of a call it is.
    pub kind: SpanKind,
    /// Its number.
    pub id: u64,
    /// The span that it is part of; none begins a trace.
    pub parent: Option<u64>,
    /// Whether that one is another process's.
    pub parent_is_remote: bool,
    /// From then.
    pub began: SystemTime,
    /// Until then.
    pub ended: SystemTime,
    /// What is known of it.
    pub attributes: Vec<KeyValue>,
    /// What happened in it.
    pub events: Vec<(&'static str, SystemTime, Vec<KeyValue>)>,
    /// Why it failed.
    pub error: Option<Cow<'static, str>>,
}

impl Span {
    /// A part of another span of this process.
    pub fn part(name: impl Into<Cow<'static, str>>, of: u64, began: SystemTime, ended: SystemTime) -> Self {
        Self {
            name: name.into(),
            kind: SpanKind::Internal,
            id: new_span(),
            parent: Some(of),
            parent_is_remote: false,
            began,
            ended,
            attributes: Vec::new(),
            events: Vec::new(),
            error: None,
        }
    }

    /// The whole of a request in this process.
    pub fn request(
        name: impl Into<Cow<'static, str>>,
        context: &Context,
        began: SystemTime,
        ended: SystemTime,
    ) -> Self {
        Self {
            kind: SpanKind::Server,
            id: context.span,
            parent: context.parent,
            parent_is_remote: context.parent.is_some(),
            ..Self::part(name, context.span, began, ended)
        }
    }
}

impl Tracer {
    /// What the configuration asks for; none when it asks for nothing. `service` is which part of Tidegate it is, `instance` which of them.
    /// Call it outside any runtime.
    ///
    /// # Errors
    /// When the endpoint cannot be used.
    pub fn open(
        config: &TelemetryConfig,
        service: &'static str,
        instance: &str,
    ) -> Result<Option<Arc<Self>>, TelemetryError> {
        let Some(endpoint) = config.otlp_endpoint.as_ref().filter(|_| config.traces) else { return Ok(None) };
        let exporter = SpanExporter::builder()
            .with_http()
            .with_protocol(Protocol::HttpBinary)
            .with_endpoint(format!("{endpoint}/v1/traces"))
            .with_timeout(config.timeout)
            .build()
            .map_err(TelemetryError::new)?;
        let mut processor = BatchSpanProcessor::builder(exporter).build();
        processor.set_resource(&resource(config, service, instance));
        let scope = InstrumentationScope::builder("tidegate").with_version(env!("CARGO_PKG_VERSION")).build();
        Ok(Some(Arc::new(Self { processor, scope, sampling: config.sampling })))
    }

    /// A request's place: in the trace that it came with, or a new one.
    pub fn begin(&self, traceparent: Option<&str>, tracestate: Option<&str>) -> Context {
        traceparent.and_then(|header| Context::of_headers(header, tracestate)).unwrap_or_else(|| {
            let trace = rand::random::<u128>().max(1);
            Context { trace, span: new_span(), parent: None, is_sampled: is_sampled(trace, self.sampling), state: None }
        })
    }

    /// Hands a span of a sampled request to the exporter, whose queue is bounded.
    pub fn export(&self, context: &Context, span: Span) {
        let state = context.tracestate().and_then(|state| state.parse().ok()).unwrap_or_default();
        let id = |span: u64| SpanId::from_bytes(span.to_be_bytes());
        let trace = TraceId::from_bytes(context.trace.to_be_bytes());
        let mut events = SpanEvents::default();
        events.events = span.events.into_iter().map(|(name, at, fields)| Event::new(name, at, fields, 0)).collect();
        self.processor.on_end(SpanData {
            span_context: SpanContext::new(trace, id(span.id), TraceFlags::SAMPLED, false, state),
            parent_span_id: span.parent.map_or(SpanId::INVALID, id),
            parent_span_is_remote: span.parent_is_remote,
            span_kind: span.kind,
            name: span.name,
            start_time: span.began,
            end_time: span.ended.max(span.began),
            attributes: span.attributes,
            dropped_attributes_count: 0,
            events,
            links: Default::default(),
            status: span.error.map_or(Status::Unset, Status::error),
            instrumentation_scope: self.scope.clone(),
        });
    }

    /// Exports what is left. It may block for some seconds.
    pub fn close(&self) {
        if let Err(error) = self.processor.shutdown() {
            warn!(%error, "the last spans could not be exported");
        }
    }
}

/// Who exports.
pub(crate) fn resource(config: &TelemetryConfig, service: &'static str, instance: &str) -> Resource {
    Resource::builder()
        .with_service_name(config.service_name.clone())
        .with_attribute(KeyValue::new("service.namespace", "tidegate"))
        .with_attribute(KeyValue::new("service.version", env!("CARGO_PKG_VERSION")))
        .with_attribute(KeyValue::new("service.instance.id", instance.to_owned()))
        .with_attribute(KeyValue::new("tidegate.role", service))
        .build()
}

/// Whether a new trace is one of so many; the same at each process, since the trace's own number decides.
fn is_sampled(trace: u128, sampling: f64) -> bool {
    let place = (trace as u64 >> 11) as f64 / (1u64 << 53) as f64;
    place < sampling
}

/// `gen_ai.operation.name` of a path of the API.
pub fn operation(path: &str) -> Option<&'static str> {
    match path {
        paths::CHAT_COMPLETIONS | paths::CHAT | paths::API_CHAT | paths::RESPONSES | paths::MESSAGES => Some("chat"),
        paths::COMPLETIONS => Some("text_completion"),
        paths::EMBEDDINGS => Some("embeddings"),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const GOOD: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

    #[test]
    fn a_place_in_a_trace_is_read_and_told_on() {
        let context = Context::of_headers(GOOD, Some("a=1,b=2")).unwrap();
        assert_eq!(context.trace, 0x0af7_6519_16cd_43dd_8448_eb21_1c80_319c);
        assert_eq!((context.parent, context.is_sampled), (Some(0xb7ad_6b71_6920_3331), true));
        assert_eq!(context.tracestate(), Some("a=1,b=2"));
        assert_eq!(context.traceparent(0xb7ad_6b71_6920_3331), GOOD);
        assert!(
            Context::of_headers(&format!("{}-more", GOOD.replacen("00", "01", 1)), None).is_some(),
            "a later version"
        );
        assert_eq!(Context::of_headers(GOOD, Some("no state\u{7f}")).unwrap().tracestate(), None);
    }

    #[test]
    fn what_is_no_place_in_a_trace_is_none() {
        for bad in [
            "",
            "00",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331",
            "00-00000000000000000000000000000000-b7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01",
            "00-0AF7651916CD43DD8448EB211C80319C-b7ad6b7169203331-01",
            "ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-x",
            "00-+af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        ] {
            assert_eq!(Context::of_headers(bad, None), None, "{bad}");
        }
    }

    proptest! {
        #[test]
        fn no_header_is_too_odd_to_be_read(header in "[0-9a-f-]{0,60}|.{0,60}") {
            let _ = Context::of_headers(&header, Some(&header));
        }

        #[test]
        fn more_sampling_never_leaves_out_a_trace(trace: u128, some in 0.0..1.0f64, more in 0.0..1.0f64) {
            prop_assert!(is_sampled(trace, 1.0) && !is_sampled(trace, 0.0));
            prop_assert!(!is_sampled(trace, some.min(more)) || is_sampled(trace, some.max(more)));
        }
    }
}
