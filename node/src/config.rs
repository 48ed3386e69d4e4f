//! `[node]`, checked once.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use bytesize::ByteSize;
use tidegate_common::{
    config::{Reader, read_pair},
    ids::{Color, NodeId, SiteName},
    tls,
};

mod models;

use crate::{
    engine::Pooling,
    kernels::KvDtype,
    machine::{self, Memory},
    models::Store,
    output::ToolFormat,
    sizes::Size,
    speculate::Speculation,
    weights::{Quantize, Recommended},
};

pub use models::{LoadWhen, ModelConfig};
pub(crate) use models::{MODELS_MAX, check_name};

/// Most that `max_queue` can be.
const QUEUE_MAX: usize = 65_536;

/// Port of the private listener when the configuration names none.
pub const ADMIN_PORT: u16 = 18801;

/// Everything a node is told.
#[derive(Debug, Clone)]
pub struct NodeConfig {
    /// The node's id; its host's name unless given.
    pub id: NodeId,
    /// Address to serve on.
    pub listen: SocketAddr,
    /// `host:port` under which balancers reach it.
    pub advertise: Option<String>,
    /// TLS of the listener.
    pub tls: Option<TlsFiles>,
    /// The private listener; none when it is `"off"`.
    pub admin: Option<AdminConfig>,
    /// Which models, never empty; the first is the one that requests get which name none.
    pub models: Vec<ModelConfig>,
    /// `models_memory`: bytes that the weights and keys and values of all loaded models may take; a share of the machine's available
    /// memory when not given.
    pub models_bytes: Option<u64>,
    /// Whether matrices are quantized as models are loaded that do not say.
    pub quantize: Quantize,
    /// Where models are kept.
    pub data_dir: PathBuf,
    /// Version of the model or its deployment.
    pub version: String,
    /// Blue or green.
    pub color: Color,
    /// Where the node stands.
    pub site: SiteName,
    /// Share in round-robin.
    pub weight: u32,
    /// What it computes on.
    pub device: DeviceConfig,
    /// Sizes and bounds of the engine.
    pub engine: EngineLimits,
    /// Bounds of a request.
    pub request: RequestLimits,
    /// What a request gets that does not say.
    pub defaults: Defaults,
    /// `tool_parser`: how the model writes calls of tools.
    pub tool_parser: ToolParser,
    /// `reasoning_parser`: whether the model thinks before it answers.
    pub reasoning_parser: ReasoningParser,
    /// `embeddings`: how vectors are made of texts; none when they are not served.
    pub embeddings: Option<Pooling>,
    /// How long running answers may go on once the node is told to stop.
    pub drain_grace: Duration,
    /// A node whose sequences run and whose steps have not ended for this long calls itself stalled.
    pub stall_after: Duration,
}

/// `[node.admin]`: the private listener.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AdminConfig {
    /// Address to serve on; always loopback.
    pub listen: SocketAddr,
    /// Whether the configuration names it. Then it must be had; else the node does without where another process has it.
    pub is_named: bool,
}

/// Files of the listener's TLS.
#[derive(Debug, Clone)]
pub struct TlsFiles {
    /// Certificate chain, PEM.
    pub cert: PathBuf,
    /// Its key, PEM.
    pub key: PathBuf,
    /// Only clients with a certificate of this CA are served.
    pub client_ca: Option<PathBuf>,
}

/// `device`: what the node computes on.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum DeviceConfig {
    /// This machine's cores.
    Cpu,
    /// An NVIDIA GPU.
    #[cfg(feature = "cuda")]
    Cuda {
        /// `gpu`: which, as the driver counts them from 0.
        gpu: usize,
        /// `gpu_memory_utilization`: the share of its memory that models may take, weights, keys and values.
        memory_share: f64,
        /// `batch_invariant`: whether an answer must not depend on what shares its steps, at a cost. Cores always hold to that.
        is_invariant: bool,
    },
}

/// Sizes and bounds of the engine.
#[derive(Debug, Clone)]
pub struct EngineLimits {
    /// Threads of the kernels.
    pub threads: usize,
    /// `max_batch_size`: most sequences in a batch.
    pub batch_size_max: usize,
    /// `max_batch_tokens`: most tokens in a step.
    pub batch_tokens_max: usize,
    /// `max_queue`: most sequences that wait.
    pub queue_max: usize,
    /// `max_queue_per_tenant`: most of one tenant's sequences that wait.
    pub queue_max_tenant: usize,
    /// `max_context`: most tokens of prompt and answer; the model's own when not given.
    pub context_max: Option<usize>,
    /// `kv_cache_memory`: bytes for keys and values; a share of the machine's free memory when not given.
    pub kv_cache_bytes: Option<u64>,
    /// `kv_cache_dtype`: how the keys and values of models are kept that do not say.
    pub kv_dtype: KvDtype,
    /// `speculative`: whether next tokens are guessed.
    pub speculation: Speculation,
    /// What was decided, and why; for the log.
    pub sizes: Vec<Size>,
}

/// Bounds of a request.
#[derive(Debug, Clone)]
pub struct RequestLimits {
    /// `max_body`: bytes.
    pub body_bytes_max: usize,
    /// `max_concurrent_requests`: most requests at once, from the first byte of their bodies to the last of their answers.
    pub concurrent_max: usize,
    /// `max_choices`: most answers of one request, prompts times `n`.
    pub choices_max: usize,
    /// `request_timeout`: most time from the request's arrival to its answer's end.
    pub timeout: Duration,
}

/// How calls of tools are found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ToolParser {
    /// As the chat template shows.
    Auto,
    /// In this form.
    Fixed(ToolFormat),
}

/// How thoughts are found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReasoningParser {
    /// As the chat template shows.
    Auto,
    /// They are not looked for.
    None,
    /// Between `<think>` and `</think>`.
    Think,
}

/// `[node.defaults]`
#[derive(Debug, Clone)]
pub struct Defaults {
    /// `temperature`; what the model's makers recommend when not given, else 0.7.
    pub temperature: Option<f32>,
    /// `top_p`; what the model's makers recommend when not given, else 0.92.
    pub top_p: Option<f32>,
    /// `max_tokens`; the context's end comes first where it is nearer.
    pub tokens_max: usize,
}

const TOOL_PARSERS: [(&str, ToolParser); 6] = [
    ("auto", ToolParser::Auto),
    ("hermes", ToolParser::Fixed(ToolFormat::Hermes)),
    ("hermes_list", ToolParser::Fixed(ToolFormat::HermesList)),
    ("llama3_json", ToolParser::Fixed(ToolFormat::Llama3)),
    ("mistral", ToolParser::Fixed(ToolFormat::Mistral)),
    ("json", ToolParser::Fixed(ToolFormat::Json)),
];

const REASONING_PARSERS: [(&str, ReasoningParser); 3] =
    [("auto", ReasoningParser::Auto), ("none", ReasoningParser::None), ("think", ReasoningParser::Think)];

const SPECULATIVE: [(&str, Speculation); 3] =
    [("auto", Speculation::Auto), ("off", Speculation::Off), ("always", Speculation::Always)];

const EMBEDDINGS: [(&str, Option<Pooling>); 3] =
    [("mean", Some(Pooling::Mean)), ("last", Some(Pooling::Last)), ("off", None)];

impl NodeConfig {
    /// Reads `[node]`; all faults are noted in the reader.
    pub fn read(root: &Reader<'_>) -> Self {
        let r = root.section("node");
        let listen = r.parse("listen").unwrap_or_else(|| SocketAddr::from(([127, 0, 0, 1], 18800)));
        let tls = TlsFiles::read(&r.section("tls"));
        refuse_open_listener(&r, listen, tls.as_ref());
        let mut engine = EngineLimits::read(&r);
        let request = RequestLimits::read(&r, &mut engine);
        Self {
            id: r.parse("id").unwrap_or_else(host_name),
            listen,
            advertise: r.get("advertise"),
            tls,
            admin: AdminConfig::read(&r.section("admin")),
            models: models::read(&r),
            models_bytes: r.get::<ByteSize>("models_memory").map(|size| size.0),
            quantize: quantize(&r),
            data_dir: data_dir(&r),
            version: r.get_or("version", String::new()),
            color: r.parse("color").unwrap_or_else(|| "blue".parse().expect("'blue' is a valid name")),
            site: r.parse("site").unwrap_or_else(|| "local".parse().expect("'local' is a valid name")),
            weight: r.in_range("weight", 1..=1000, 1),
            device: DeviceConfig::read(&r),
            engine,
            request,
            defaults: Defaults::read(&r.section("defaults")),
            tool_parser: r.choice("tool_parser", &TOOL_PARSERS, ToolParser::Auto),
            reasoning_parser: r.choice("reasoning_parser", &REASONING_PARSERS, ReasoningParser::Auto),
            embeddings: r.choice("embeddings", &EMBEDDINGS, Some(Pooling::Mean)),
            drain_grace: r.get_or("drain_grace", Duration::from_secs(10)),
            stall_after: r.duration_or("stall_after", Duration::from_secs(10)),
        }
    }

    /// The model that requests get which name none.
    pub fn default_model(&self) -> &ModelConfig {
        self.models.first().expect("a configuration has a model")
    }

    /// `host:port` that the node announces.
    pub fn address(&self) -> String {
        self.advertise.clone().unwrap_or_else(|| self.listen.to_string())
    }
}

impl AdminConfig {
    fn read(r: &Reader<'_>) -> Option<Self> {
        let default = SocketAddr::from(([127, 0, 0, 1], ADMIN_PORT));
        if r.has("listen") && r.get::<String>("listen").as_deref() == Some("off") {
            return None;
        }
        let listen = r.parse::<SocketAddr>("listen");
        if let Some(open) = listen.filter(|address| !address.ip().is_loopback()) {
            r.problem(
                "listen",
                format!("{open} is not a loopback address"),
                "whoever reaches it may load and unload models: use 127.0.0.1, or \"off\"",
            );
        }
        Some(Self { listen: listen.unwrap_or(default), is_named: listen.is_some() })
    }
}

impl TlsFiles {
    /// All of them.
    pub fn all(&self) -> Vec<PathBuf> {
        [&self.cert, &self.key].into_iter().chain(&self.client_ca).cloned().collect()
    }

    fn read(r: &Reader<'_>) -> Option<Self> {
        let client_ca = r.get::<PathBuf>("client_ca");
        let (cert, key) = read_pair(r, "cert", "key")?;
        if let Err(e) = tls::Identity::read(&cert, &key) {
            r.problem("cert", e.to_string(), "give a PEM certificate chain and the key that belongs to it");
        }
        if let Some(Err(e)) = client_ca.as_deref().map(tls::read_roots) {
            r.problem(
                "client_ca",
                e.to_string(),
                "give the PEM certificate of the CA that signs the balancers' certificates",
            );
        }
        Some(Self { cert, key, client_ca })
    }
}

impl EngineLimits {
    fn read(r: &Reader<'_>) -> Self {
        let mut sizes = Sizes::new(r);
        let cores = machine::cores();
        let threads = sizes.read("threads", 1..=1024, cores, || "cores that this process may use".into());
        let batch_size_max = sizes.read("max_batch_size", 1..=4096, (16 * threads).clamp(32, 256), || {
            format!("16 for each of {threads} threads, from 32 to 256")
        });
        let tokens = (128 * threads).clamp(256, 4096).max(batch_size_max);
        let batch_tokens_max = sizes.read("max_batch_tokens", 1..=65_536, tokens, || {
            format!("128 for each of {threads} threads, from 256 to 4096, and no less than max_batch_size")
        });
        let queue = (8 * batch_size_max).min(QUEUE_MAX);
        let queue_max = sizes.read("max_queue", 0..=QUEUE_MAX, queue, || "8 batches".into());
        let queue_max_tenant =
            sizes.read("max_queue_per_tenant", 0..=QUEUE_MAX, queue_max.div_ceil(2), || "half of max_queue".into());
        if batch_tokens_max < batch_size_max {
            let message =
                format!("{batch_tokens_max} tokens a step leave some of {batch_size_max} sequences without a turn");
            r.problem("max_batch_tokens", message, "make it at least max_batch_size");
        }
        if queue_max_tenant > queue_max {
            let message = format!("one tenant may not have more waiting than all together, which is {queue_max}");
            r.problem("max_queue_per_tenant", message, "make it at most max_queue");
        }
        Self {
            threads,
            batch_size_max,
            batch_tokens_max,
            queue_max,
            queue_max_tenant,
            context_max: r.get_in_range("max_context", 2..=16_777_216),
            kv_cache_bytes: r.get::<ByteSize>("kv_cache_memory").map(|size| size.0),
            kv_dtype: kv_dtype(r),
            speculation: r.choice("speculative", &SPECULATIVE, Speculation::Auto),
            sizes: sizes.found,
        }
    }

    /// Most sequences of one tenant, running and waiting.
    pub fn places_tenant(&self) -> usize {
        self.batch_size_max + self.queue_max_tenant
    }
}

impl RequestLimits {
    fn read(r: &Reader<'_>, engine: &mut EngineLimits) -> Self {
        let body_bytes_max = r.get_or("max_body", ByteSize::mib(8)).0 as usize;
        let choices_max = r.in_range("max_choices", 1..=128, 16.min(engine.places_tenant()));
        if choices_max > engine.places_tenant() {
            let message = format!(
                "a request with {choices_max} answers could never be taken: {} run and {} of one tenant wait at most",
                engine.batch_size_max, engine.queue_max_tenant
            );
            r.problem("max_choices", message, "lower it, or raise max_batch_size or max_queue_per_tenant");
        }
        let mut sizes = Sizes::new(r);
        let places = engine.batch_size_max + engine.queue_max;
        let bodies = usize::try_from(Memory::available().bytes / 4).unwrap_or(usize::MAX) / body_bytes_max.max(1);
        let concurrent = places.min(bodies).max(engine.batch_size_max);
        let concurrent_max =
            sizes.read("max_concurrent_requests", 1..=1_000_000, concurrent, || match bodies < places {
                true => "as many bodies of max_body as a quarter of the free memory holds".into(),
                false => "max_batch_size and max_queue together".into(),
            });
        engine.sizes.append(&mut sizes.found);
        Self { concurrent_max, body_bytes_max, choices_max, timeout: timeout(r) }
    }
}

/// Reads sizes, and notes where each comes from.
struct Sizes<'a, 'b> {
    r: &'a Reader<'b>,
    found: Vec<Size>,
}

impl<'a, 'b> Sizes<'a, 'b> {
    fn new(r: &'a Reader<'b>) -> Self {
        Self { r, found: Vec::new() }
    }

    fn read(
        &mut self,
        key: &'static str,
        range: std::ops::RangeInclusive<usize>,
        automatic: usize,
        why: impl FnOnce() -> String,
    ) -> usize {
        let given = self.r.get_in_range(key, range);
        let value = given.unwrap_or(automatic);
        let why = given.map_or_else(why, |_| "configured".into());
        self.found.push(Size { key, value: value as u64, why });
        value
    }
}

impl Defaults {
    /// The temperature of a request that does not say, for a model whose makers recommend this.
    pub fn temperature(&self, recommended: &Recommended) -> f32 {
        self.temperature.or(recommended.temperature).unwrap_or(0.7)
    }

    /// The same of `top_p`.
    pub fn top_p(&self, recommended: &Recommended) -> f32 {
        self.top_p.or(recommended.top_p).unwrap_or(0.92)
    }

    fn read(r: &Reader<'_>) -> Self {
        Self {
            temperature: r.get_in_range("temperature", 0.0..=2.0).map(|x: f64| x as f32),
            top_p: r.get_in_range("top_p", 0.0..=1.0).map(|x: f64| x as f32),
            tokens_max: r.in_range("max_tokens", 1..=16_777_216, 2048),
        }
    }
}

fn quantize(r: &Reader<'_>) -> Quantize {
    r.choice("quantize", &[Quantize::None, Quantize::Int8, Quantize::Int4].map(|q| (q.name(), q)), Quantize::None)
}

fn kv_dtype(r: &Reader<'_>) -> KvDtype {
    r.choice("kv_cache_dtype", &[KvDtype::F16, KvDtype::Bf16, KvDtype::Int8].map(|d| (d.name(), d)), KvDtype::F16)
}

fn timeout(r: &Reader<'_>) -> Duration {
    const DAY: Duration = Duration::from_secs(86_400);
    let timeout = r.duration_or("request_timeout", Duration::from_secs(300));
    if timeout > DAY {
        r.problem("request_timeout", "longer than a day", "choose at most \"1day\"");
    }
    timeout.min(DAY)
}

/// A plaintext listener that others can reach must be asked for in so many words.
fn refuse_open_listener(r: &Reader<'_>, listen: SocketAddr, tls: Option<&TlsFiles>) {
    let insecure = r.get_or("insecure", false);
    if !listen.ip().is_loopback() && tls.is_none() && !insecure {
        let fix = "set node.tls.cert and node.tls.key, listen on a loopback address, or set node.insecure = true on a network you trust";
        r.problem("listen", format!("{listen} is not a loopback address and has no TLS"), fix);
    }
}

impl DeviceConfig {
    fn read(r: &Reader<'_>) -> Self {
        let wants_cuda = r.choice("device", &[("cpu", false), ("cuda", true)], false);
        let gpu = r.in_range("gpu", 0..=1024, 0usize);
        let memory_share = r.in_range("gpu_memory_utilization", 0.05..=1.0, 0.9);
        let is_invariant = r.get_or("batch_invariant", false);
        match wants_cuda {
            false => Self::Cpu,
            #[cfg(feature = "cuda")]
            true => Self::Cuda { gpu, memory_share, is_invariant },
            #[cfg(not(feature = "cuda"))]
            true => {
                let _ = (gpu, memory_share, is_invariant);
                let fix = "use device = \"cpu\", or a build with CUDA (`make cuda-build`)";
                r.problem("device", "this build has no CUDA support", fix);
                Self::Cpu
            }
        }
    }
}

fn data_dir(r: &Reader<'_>) -> PathBuf {
    r.get("data_dir").unwrap_or_else(|| {
        Store::default_data_dir().unwrap_or_else(|e| {
            r.problem("data_dir", e.to_string(), "set node.data_dir, or the environment variable TIDEGATE_DATA_DIR");
            PathBuf::new()
        })
    })
}

fn host_name() -> NodeId {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    name.trim().parse().unwrap_or_else(|_| "node".parse().expect("'node' is a valid name"))
}

#[cfg(test)]
mod tests {
    use tidegate_common::config::Raw;

    use super::*;

    fn read(text: &str) -> Result<NodeConfig, String> {
        Raw::from_toml(text, "t").unwrap().check(NodeConfig::read).map_err(|e| e.to_string())
    }

    #[test]
    fn an_empty_file_is_a_whole_configuration() {
        let config = read("").unwrap();
        assert_eq!(config.default_model().name, "smollm2-135m");
        assert_eq!(config.admin, Some(AdminConfig { listen: "127.0.0.1:18801".parse().unwrap(), is_named: false }));
        assert_eq!(config.address(), "127.0.0.1:18800");
    }

    #[test]
    fn an_open_listener_must_be_asked_for() {
        let error = read("[node]\nlisten = \"0.0.0.0:18800\"").unwrap_err();
        assert!(error.contains("node.listen") && error.contains("insecure = true"), "{error}");
        assert!(read("[node]\nlisten = \"0.0.0.0:18800\"\ninsecure = true").is_ok());
    }

    #[test]
    fn every_size_has_a_reason_and_those_that_contradict_each_other_are_all_named() {
        let config = read("[node]\nthreads = 4\nmax_queue = 10").unwrap();
        let why = |key: &str| config.engine.sizes.iter().find(|s| s.key == key).map(|s| (s.value, s.why.as_str()));
        assert_eq!(why("max_batch_size"), Some((64, "16 for each of 4 threads, from 32 to 256")));
        assert_eq!(why("max_queue"), Some((10, "configured")));
        assert_eq!(why("max_queue_per_tenant"), Some((5, "half of max_queue")));
        assert!(why("max_concurrent_requests").is_some());
        assert_eq!(read("[node]\nmax_batch_size = 2\nmax_queue = 0").unwrap().request.choices_max, 2);

        let error = read(
            "[node]\nmax_batch_size = 8\nmax_batch_tokens = 4\nmax_queue = 2\nmax_queue_per_tenant = 3\nmax_choices = 64",
        )
        .unwrap_err();
        for part in ["node.max_batch_tokens", "node.max_queue_per_tenant", "node.max_choices"] {
            assert!(error.contains(part), "{part} not in {error}");
        }
    }

    #[test]
    fn speculation_is_on_unless_it_is_switched_off() {
        assert_eq!(read("").unwrap().engine.speculation, Speculation::Auto);
        assert_eq!(read("[node]\nspeculative = \"off\"").unwrap().engine.speculation, Speculation::Off);
        let error = read("[node]\nspeculative = \"sometimes\"").unwrap_err();
        assert!(error.contains("node.speculative") && error.contains("always"), "{error}");
    }

    #[test]
    fn the_private_listener_stays_private() {
        let error = read("[node.admin]\nlisten = \"0.0.0.0:1\"").unwrap_err();
        assert!(error.contains("node.admin.listen") && error.contains("not a loopback"), "{error}");
        assert!(read("[node.admin]\nlisten = \"off\"").unwrap().admin.is_none());
    }

    #[test]
    fn absurd_numbers_name_their_range() {
        let error = read("[node]\nmax_batch_size = 0\nmax_context = 1\n[node.defaults]\ntemperature = 9").unwrap_err();
        for part in ["node.max_batch_size", "node.max_context", "node.defaults.temperature"] {
            assert!(error.contains(part), "{error}");
        }
    }
}
