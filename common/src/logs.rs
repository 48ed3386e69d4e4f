//! Records as logs of OpenTelemetry, exported by OTLP over HTTP: the balancer's audit records, for a SIEM.

use std::{fmt, time::SystemTime};

use opentelemetry::{
    SpanId, TraceFlags, TraceId,
    logs::{AnyValue, LogRecord, Logger, LoggerProvider, Severity},
};
use opentelemetry_otlp::{LogExporter, Protocol, WithExportConfig};
use opentelemetry_sdk::logs::{SdkLogger, SdkLoggerProvider};
use tracing::warn;

use crate::{
    config::TelemetryConfig,
    trace::{TelemetryError, resource},
};

/// Exports records.
pub struct Logs {
    provider: SdkLoggerProvider,
    logger: SdkLogger,
}

impl fmt::Debug for Logs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Logs").finish_non_exhaustive()
    }
}

/// One record.
#[derive(Debug)]
pub struct Record {
    /// When it happened.
    pub time: SystemTime,
    /// Whether something went wrong.
    pub is_warning: bool,
    /// The whole of it, as text.
    pub body: String,
    /// What it is found by.
    pub attributes: Vec<(String, String)>,
    /// The trace it belongs to.
    pub trace: Option<u128>,
}

impl Logs {
    /// What the configuration asks for; none when it asks for nothing. Call it outside any runtime.
    ///
    /// # Errors
    /// When the endpoint cannot be used.
    pub fn open(
        config: &TelemetryConfig,
        service: &'static str,
        instance: &str,
    ) -> Result<Option<Self>, TelemetryError> {
        let Some(endpoint) = config.otlp_endpoint.as_ref().filter(|_| config.logs) else { return Ok(None) };
        let exporter = LogExporter::builder()
            .with_http()
            .with_protocol(Protocol::HttpBinary)
            .with_endpoint(format!("{endpoint}/v1/logs"))
            .with_timeout(config.timeout)
            .build()
            .map_err(TelemetryError::new)?;
        let provider = SdkLoggerProvider::builder()
            .with_resource(resource(config, service, instance))
            .with_batch_exporter(exporter)
            .build();
        let logger = provider.logger("tidegate.audit");
        Ok(Some(Self { provider, logger }))
    }

    /// Hands a record to the exporter, whose queue is bounded.
    pub fn export(&self, record: Record) {
        let mut log = self.logger.create_log_record();
        log.set_timestamp(record.time);
        log.set_observed_timestamp(SystemTime::now());
        let (severity, word) = if record.is_warning { (Severity::Warn, "WARN") } else { (Severity::Info, "INFO") };
        log.set_severity_number(severity);
        log.set_severity_text(word);
        log.set_body(AnyValue::from(record.body));
        log.add_attributes(record.attributes);
        if let Some(trace) = record.trace {
            log.set_trace_context(
                TraceId::from_bytes(trace.to_be_bytes()),
                SpanId::INVALID,
                Some(TraceFlags::default()),
            );
        }
        self.logger.emit(log);
    }

    /// Exports what is left. It may block for some seconds.
    pub fn close(&self) {
        if let Err(error) = self.provider.shutdown() {
            warn!(%error, "the last records could not be exported");
        }
    }
}
