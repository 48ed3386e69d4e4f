//! A collector of OpenTelemetry that keeps what it is sent.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
};

use opentelemetry_proto::tonic::{
    collector::{logs::v1::ExportLogsServiceRequest, trace::v1::ExportTraceServiceRequest},
    common::v1::{KeyValue, any_value::Value},
    resource::v1::Resource,
    trace::v1,
};
use prost::Message;
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::{TcpListener, TcpStream},
};

/// A span as it came.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Span {
    pub(crate) name: String,
    /// `tidegate.role` of who sent it.
    pub(crate) role: String,
    pub(crate) trace: String,
    pub(crate) id: String,
    /// Empty at a trace's beginning.
    pub(crate) parent: String,
    /// From and to, in nanoseconds since 1970.
    pub(crate) time: (u64, u64),
    pub(crate) attributes: BTreeMap<String, String>,
    /// Names of its events.
    pub(crate) events: Vec<String>,
    pub(crate) is_error: bool,
}

/// A log record as it came: its text, and its attributes.
pub(crate) type Log = (String, BTreeMap<String, String>);

#[derive(Debug, Default)]
struct Kept {
    spans: Vec<Span>,
    logs: Vec<Log>,
}

/// A running collector.
pub(crate) struct Collector {
    pub(crate) port: u16,
    kept: Arc<Mutex<Kept>>,
}

impl Collector {
    pub(crate) async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let kept = Arc::<Mutex<Kept>>::default();
        let all = Arc::clone(&kept);
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(serve(stream, Arc::clone(&all)));
            }
        });
        Self { port, kept }
    }

    /// The section of a configuration that exports to it.
    pub(crate) fn section(&self, more: &str) -> String {
        format!("[telemetry]\notlp_endpoint = \"http://127.0.0.1:{}\"\n{more}\n", self.port)
    }

    pub(crate) fn spans(&self) -> Vec<Span> {
        self.kept.lock().unwrap().spans.clone()
    }

    #[allow(dead_code, reason = "only some tests look at them")]
    pub(crate) fn logs(&self) -> Vec<Log> {
        self.kept.lock().unwrap().logs.clone()
    }
}

async fn serve(stream: TcpStream, kept: Arc<Mutex<Kept>>) {
    let mut stream = BufReader::new(stream);
    loop {
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            if stream.read_line(&mut head).await.unwrap_or(0) == 0 {
                return;
            }
        }
        let length = head.lines().filter_map(|line| line.split_once(": "));
        let length = length.filter(|(name, _)| name.eq_ignore_ascii_case("content-length"));
        let mut body = vec![0; length.map(|(_, value)| value.parse::<usize>().unwrap()).next().unwrap_or(0)];
        if stream.read_exact(&mut body).await.is_err() {
            return;
        }
        keep(&head, &body, &mut kept.lock().unwrap());
        let answer = "HTTP/1.1 200 OK\r\ncontent-type: application/x-protobuf\r\ncontent-length: 0\r\n\r\n";
        if stream.write_all(answer.as_bytes()).await.is_err() {
            return;
        }
    }
}

fn keep(head: &str, body: &[u8], kept: &mut Kept) {
    if head.starts_with("POST /v1/traces ") {
        for of_one in ExportTraceServiceRequest::decode(body).unwrap().resource_spans {
            let role = role(of_one.resource);
            let spans = of_one.scope_spans.into_iter().flat_map(|scope| scope.spans);
            kept.spans.extend(spans.map(|span| read(span, &role)));
        }
    } else if head.starts_with("POST /v1/logs ") {
        for of_one in ExportLogsServiceRequest::decode(body).unwrap().resource_logs {
            let records = of_one.scope_logs.into_iter().flat_map(|scope| scope.log_records);
            kept.logs.extend(records.map(|record| {
                (record.body.and_then(|body| body.value).map(text).unwrap_or_default(), table(record.attributes))
            }));
        }
    }
}

fn read(span: v1::Span, role: &str) -> Span {
    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    Span {
        name: span.name,
        role: role.to_owned(),
        trace: hex(&span.trace_id),
        id: hex(&span.span_id),
        parent: hex(&span.parent_span_id),
        time: (span.start_time_unix_nano, span.end_time_unix_nano),
        attributes: table(span.attributes),
        events: span.events.into_iter().map(|event| event.name).collect(),
        is_error: span.status.is_some_and(|status| status.code == v1::status::StatusCode::Error as i32),
    }
}

fn role(resource: Option<Resource>) -> String {
    table(resource.unwrap_or_default().attributes).remove("tidegate.role").unwrap_or_default()
}

fn table(fields: Vec<KeyValue>) -> BTreeMap<String, String> {
    let read = |field: KeyValue| (field.key, field.value.and_then(|value| value.value).map(text).unwrap_or_default());
    fields.into_iter().map(read).collect()
}

fn text(value: Value) -> String {
    match value {
        Value::StringValue(text) => text,
        Value::IntValue(n) => n.to_string(),
        Value::DoubleValue(n) => n.to_string(),
        other => format!("{other:?}"),
    }
}
