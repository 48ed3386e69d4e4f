//! Pingora's own proxy in front of one upstream, and nothing else: what `benches/compare/edge.py` holds Tidegate's balancer against.
//!
//! `bare_pingora LISTEN UPSTREAM [CERT KEY]`: one thread, TLS where there is a certificate, connections to the upstream kept.

use async_trait::async_trait;
use pingora::{
    listeners::tls::TlsSettings,
    proxy::{ProxyHttp, Session, http_proxy_service},
    server::{Server, configuration::ServerConf},
    upstreams::peer::HttpPeer,
};

struct Proxy {
    upstream: String,
}

#[async_trait]
impl ProxyHttp for Proxy {
    type CTX = ();

    fn new_ctx(&self) {}

    async fn upstream_peer(&self, _: &mut Session, (): &mut ()) -> pingora::Result<Box<HttpPeer>> {
        Ok(Box::new(HttpPeer::new(self.upstream.as_str(), false, String::new())))
    }
}

fn main() {
    tidegate_common::tls::install_provider();
    let words: Vec<String> = std::env::args().skip(1).collect();
    let (listen, upstream) = (&words[0], words[1].clone());
    let mut conf = ServerConf::default();
    (conf.threads, conf.upstream_keepalive_pool_size) = (1, 512);
    let mut server = Server::new_with_opt_and_conf(None, conf);
    server.bootstrap();
    let mut service = http_proxy_service(&server.configuration, Proxy { upstream });
    match words.get(2..4) {
        Some([cert, key]) => {
            let settings = TlsSettings::intermediate(cert, key).expect("a certificate and its key");
            service.add_tls_with_settings(listen, None, settings);
        }
        _ => service.add_tcp(listen),
    }
    server.add_service(service);
    server.run_forever();
}
