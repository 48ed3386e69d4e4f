//! Signed tokens: ours and those of an identity provider, good ones and every kind of bad one; and certificates of clients.

use std::{
    net::SocketAddr,
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::{SystemTime, UNIX_EPOCH},
};

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use jsonwebtoken::{Algorithm, EncodingKey, Header, encode, jwk::Jwk};
use rcgen::{KeyPair, PKCS_ECDSA_P256_SHA256, PKCS_ED25519, PublicKeyData};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
};

use crate::{
    auth::{keys, secret},
    requests::error,
    support::{CHAT, House, chat},
};

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs()
}

/// A key pair that signs tokens.
struct Signer {
    pair: KeyPair,
    algorithm: Algorithm,
}

impl Signer {
    fn new(algorithm: Algorithm) -> Self {
        let kind = if algorithm == Algorithm::ES256 { &PKCS_ECDSA_P256_SHA256 } else { &PKCS_ED25519 };
        Self { pair: KeyPair::generate_for(kind).unwrap(), algorithm }
    }

    fn kid(&self) -> String {
        Sha256::digest(self.pair.subject_public_key_info()).iter().take(8).map(|b| format!("{b:02x}")).collect()
    }

    fn key(&self) -> EncodingKey {
        let pem = self.pair.serialize_pem();
        match self.algorithm {
            Algorithm::ES256 => EncodingKey::from_ec_pem(pem.as_bytes()).unwrap(),
            _ => EncodingKey::from_ed_pem(pem.as_bytes()).unwrap(),
        }
    }

    fn sign(&self, claims: &Value) -> String {
        self.sign_as(&self.kid(), claims)
    }

    fn sign_as(&self, kid: &str, claims: &Value) -> String {
        let header = Header { kid: Some(kid.into()), ..Header::new(self.algorithm) };
        encode(&header, claims, &self.key()).unwrap()
    }

    fn write_public(&self, path: &Path) {
        std::fs::write(path, self.pair.public_key_pem()).unwrap();
    }

    fn jwk(&self, kid: &str) -> Jwk {
        let info = self.pair.subject_public_key_info();
        let part = |from_end: usize| URL_SAFE_NO_PAD.encode(&info[info.len() - from_end..][..32]);
        let jwk = match self.algorithm {
            Algorithm::ES256 => {
                json!({"kty": "EC", "crv": "P-256", "x": part(64), "y": part(32), "alg": "ES256", "kid": kid})
            }
            _ => json!({"kty": "OKP", "crv": "Ed25519", "x": part(32), "use": "sig", "kid": kid}),
        };
        serde_json::from_value(jwk).unwrap()
    }
}

/// Claims of one of our own tokens, with others in their place.
fn claims(changes: Value) -> Value {
    let now = now();
    let mut claims = json!({"iss": "tidegate", "aud": "tidegate", "sub": "alice", "jti": "t-1", "iat": now, "nbf": now, "exp": now + 600,
        "key": "k0", "scope": "inference metrics"});
    for (name, value) in changes.as_object().unwrap() {
        match value {
            Value::Null => drop(claims.as_object_mut().unwrap().remove(name)),
            value => claims[name] = value.clone(),
        }
    }
    claims
}

async fn ask(house: &House, token: &str) -> (u16, String) {
    let response =
        house.client.post(house.url(CHAT)).bearer_auth(token).body(chat(false).to_string()).send().await.unwrap();
    let status = response.status().as_u16();
    let body = response.text().await.unwrap();
    (status, if status == 200 { String::new() } else { error(&body).0 })
}

/// A house that takes tokens of `signers` made of key `k0`, which has the scopes inference and logs.
async fn house(dir: &Path, signers: &[&Signer]) -> House {
    let keys = keys(&[
        "owner = \"alice\"\nscopes = [\"inference\", \"logs\"]",
        "owner = \"gone\"\nrevoked = 2020-01-01T00:00:00Z",
    ]);
    let revoked = secret("[[revoked]]\njti = \"t-back\"\nuntil = 2099-01-01T00:00:00Z\n");
    let paths: Vec<_> = (0..signers.len()).map(|i| dir.join(format!("{i}.pub"))).collect();
    signers.iter().zip(&paths).for_each(|(signer, path)| signer.write_public(path));
    House::with(
        1,
        &format!(
            "[balancer.auth]\nkeys_file = {:?}\n[balancer.auth.tokens]\npublic_keys = {paths:?}\nrevoked_file = {:?}",
            keys.path(),
            revoked.path()
        ),
    )
    .await
}

#[tokio::test]
async fn a_token_opens_what_its_key_and_itself_allow() {
    let dir = TempDir::new().unwrap();
    let (ed, es) = (Signer::new(Algorithm::EdDSA), Signer::new(Algorithm::ES256));
    let mut house = house(dir.path(), &[&ed, &es]).await;
    for signer in [&ed, &es] {
        let token = signer.sign(&claims(json!({})));
        for _ in 0..2 {
            assert_eq!(ask(&house, &token).await, (200, String::new()));
            assert_eq!(house.asked().await.header("x-tidegate-tenant"), Some("alice"));
        }
        // the key does not have this scope, whatever the token says
        let response = house.client.get(house.url("/metrics")).bearer_auth(&token).send().await.unwrap();
        assert_eq!(response.status(), 403);
    }
    let narrow = |changes| ed.sign(&claims(changes));
    assert_eq!(ask(&house, &narrow(json!({"scope": "logs"}))).await, (403, "insufficient_scope".into()));
    assert_eq!(ask(&house, &narrow(json!({"models": ["other"]}))).await, (403, "model_not_allowed".into()));
    assert_eq!(ask(&house, &narrow(json!({"models": ["t*"]}))).await.0, 200);
}

#[tokio::test]
async fn every_bad_token_is_refused_with_its_reason() {
    let dir = TempDir::new().unwrap();
    let (signer, stranger) = (Signer::new(Algorithm::EdDSA), Signer::new(Algorithm::EdDSA));
    let house = house(dir.path(), &[&signer]).await;
    let good = signer.sign(&claims(json!({})));
    assert_eq!(ask(&house, &good).await.0, 200);

    let now = now();
    for (changes, code) in [
        (json!({"aud": "somebody"}), "invalid_token"),
        (json!({"iss": "somebody"}), "invalid_token"),
        (json!({"exp": now - 31}), "expired_token"),
        (json!({"nbf": now + 60}), "token_not_yet_valid"),
        (json!({"iat": now + 60}), "token_not_yet_valid"),
        (json!({"exp": now + 31 * 24 * 3600}), "invalid_token"),
        (json!({"exp": null}), "invalid_token"),
        (json!({"iat": null}), "invalid_token"),
        (json!({"jti": null}), "invalid_token"),
        (json!({"key": null}), "invalid_token"),
        (json!({"key": "k9"}), "invalid_token"),
        (json!({"key": "k1"}), "revoked_api_key"),
        (json!({"jti": "t-back"}), "revoked_token"),
    ] {
        let token = signer.sign(&claims(changes.clone()));
        assert_eq!(ask(&house, &token).await, (401, code.into()), "{changes}");
    }

    let plain = |header: Value| {
        let encode = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
        format!("{}.{}", encode(&header), encode(&claims(json!({}))))
    };
    let kid = signer.kid();
    let none = format!("{}.", plain(json!({"alg": "none", "kid": kid})));
    // the public key as if it were a secret
    let public = signer.pair.public_key_pem();
    let hs256 = Header { kid: Some(kid.clone()), ..Header::new(Algorithm::HS256) };
    let confused = encode(&hs256, &claims(json!({})), &EncodingKey::from_secret(public.as_bytes())).unwrap();
    let es256 = format!("{}.AAAA", plain(json!({"alg": "ES256", "kid": kid})));
    let (body, signature) = good.rsplit_once('.').unwrap();
    let cut = format!("{body}.{}", &signature[..signature.len() - 4]);
    let moved = format!("{}.{signature}", plain(json!({"alg": "EdDSA", "kid": kid, "typ": "JWT"})));
    let unknown = stranger.sign(&claims(json!({})));
    let forged = stranger.sign_as(&kid, &claims(json!({})));
    for bad in [&none, &confused, &es256, &cut, &moved, &unknown, &forged, "eyJ..", "eyJhbGciOiJFZERTQSJ9.e30.AA"] {
        assert_eq!(ask(&house, bad).await, (401, "invalid_token".into()), "{bad}");
    }
    assert_eq!(ask(&house, "eyJ").await, (401, "invalid_api_key".into()), "that is no token at all");
}

/// An identity provider that publishes what it is told to.
struct Idp {
    address: SocketAddr,
    keys: Arc<Mutex<Vec<Jwk>>>,
    asked: Arc<AtomicUsize>,
    server: tokio::task::JoinHandle<()>,
}

impl Idp {
    async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (keys, asked) = (Arc::<Mutex<Vec<Jwk>>>::default(), Arc::<AtomicUsize>::default());
        let (published, count) = (Arc::clone(&keys), Arc::clone(&asked));
        let server = tokio::spawn(async move {
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut head = [0; 2048];
                let read = stream.read(&mut head).await.unwrap();
                let body = if head[..read].starts_with(b"GET /realm/.well-known/openid-configuration ") {
                    json!({"issuer": format!("http://{address}/realm"), "jwks_uri": format!("http://{address}/keys")})
                } else {
                    count.fetch_add(1, SeqCst);
                    json!({"keys": *published.lock().unwrap()})
                };
                let body = body.to_string();
                let answer =
                    format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}", body.len());
                stream.write_all(answer.as_bytes()).await.unwrap();
            }
        });
        Self { address, keys, asked, server }
    }

    fn issuer(&self) -> String {
        format!("http://{}/realm", self.address)
    }

    fn publish(&self, keys: Vec<Jwk>) {
        *self.keys.lock().unwrap() = keys;
    }
}

#[tokio::test]
async fn an_identity_providers_tokens_are_checked_by_the_keys_that_it_publishes() {
    let (idp, signer, next) = (Idp::start().await, Signer::new(Algorithm::ES256), Signer::new(Algorithm::EdDSA));
    idp.publish(vec![signer.jwk("one")]);
    let issuer = idp.issuer();
    let mut house = House::with(
        1,
        &format!(
            "[[balancer.auth.oidc]]\nid = \"idp\"\nissuer = \"{issuer}\"\naudience = [\"gate\"]\nscope_prefix = \"tg:\"\n\
             default_scopes = [\"logs\"]\nmodels_claim = \"tg.models\""
        ),
    )
    .await;
    let claims = |changes: Value| {
        let mut all = json!({"iss": issuer, "aud": ["other", "gate"], "sub": "bob", "exp": now() + 60, "scope": "openid tg:inference"});
        all.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        all
    };
    assert_eq!(ask(&house, &signer.sign_as("one", &claims(json!({})))).await, (200, String::new()));
    assert_eq!(house.asked().await.header("x-tidegate-tenant"), Some("idp:bob"));
    for (changes, expected) in [
        (json!({"aud": "other"}), (401, "invalid_token")),
        (json!({"exp": now() - 60}), (401, "expired_token")),
        (json!({"scope": "openid"}), (403, "insufficient_scope")),
        (json!({"tg": {"models": ["other"]}}), (403, "model_not_allowed")),
        (json!({"tg": {"models": ["tiny"]}}), (200, "")),
        (json!({"sub": ""}), (401, "invalid_token")),
    ] {
        let token = signer.sign_as("one", &claims(changes.clone()));
        assert_eq!(ask(&house, &token).await, (expected.0, expected.1.into()), "{changes}");
    }
    let foreign = signer.sign_as("one", &claims(json!({"iss": "http://127.0.0.1:1/"})));
    assert_eq!(ask(&house, &foreign).await, (401, "invalid_token".into()));
    assert_eq!(idp.asked.load(SeqCst), 1, "keys are fetched once");

    // a key that is not known has them fetched again, but not for everybody who makes one up
    idp.publish(vec![signer.jwk("one"), next.jwk("two")]);
    for _ in 0..3 {
        assert_eq!(ask(&house, &next.sign_as("made-up", &claims(json!({})))).await, (401, "invalid_token".into()));
    }
    assert_eq!(idp.asked.load(SeqCst), 1, "nor at once after the last time");
    idp.server.abort();
    assert_eq!(ask(&house, &signer.sign_as("one", &claims(json!({"n": 2})))).await.0, 200, "keys in hand stay");
}

#[tokio::test]
async fn a_provider_out_of_reach_is_told_from_a_bad_token() {
    let (idp, signer) = (Idp::start().await, Signer::new(Algorithm::EdDSA));
    let issuer = idp.issuer();
    idp.server.abort();
    let house = House::with(
        1,
        &format!("[[balancer.auth.oidc]]\nid = \"idp\"\nissuer = \"{issuer}\"\naudience = [\"gate\"]\ndefault_scopes = [\"inference\"]"),
    )
    .await;
    let claims = json!({"iss": issuer, "aud": "gate", "sub": "bob", "exp": now() + 60});
    assert_eq!(ask(&house, &signer.sign_as("one", &claims)).await, (503, "identity_provider_unavailable".into()));
    // the same from a file needs nobody
    let file = secret(&json!({"keys": [signer.jwk("one")]}).to_string());
    let house = House::with(
        1,
        &format!(
            "[[balancer.auth.oidc]]\nid = \"idp\"\nissuer = \"{issuer}\"\naudience = [\"gate\"]\ndefault_scopes = [\"inference\"]\njwks_file = {:?}",
            file.path()
        ),
    )
    .await;
    assert_eq!(ask(&house, &signer.sign_as("one", &claims)).await.0, 200);
}

#[tokio::test]
async fn a_certificate_says_who_asks_and_a_revoked_one_is_turned_away() {
    tidegate_common::tls::install_provider();
    let dir = TempDir::new().unwrap();
    let authority = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let at = |name: &str| dir.path().join(name);
    std::fs::write(at("edge.pem"), authority.cert.pem()).unwrap();
    std::fs::write(at("edge.key"), authority.signing_key.serialize_pem()).unwrap();
    let ca_key = KeyPair::generate().unwrap();
    let mut ca = rcgen::CertificateParams::default();
    ca.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    ca.key_usages = vec![rcgen::KeyUsagePurpose::KeyCertSign, rcgen::KeyUsagePurpose::CrlSign];
    std::fs::write(at("clients.pem"), ca.self_signed(&ca_key).unwrap().pem()).unwrap();
    let ca = rcgen::Issuer::new(ca, ca_key);
    let client = |name: &str, serial: u64| {
        let key = KeyPair::generate().unwrap();
        let mut params = rcgen::CertificateParams::new(vec![name.to_owned()]).unwrap();
        params.serial_number = Some(serial.into());
        params.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::ClientAuth];
        (params.signed_by(&key, &ca).unwrap().pem(), key.serialize_pem())
    };
    let (batch, stranger, revoked) =
        (client("batch-1.example", 1), client("stranger.example", 2), client("batch-2.example", 3));
    let list = rcgen::CertificateRevocationListParams {
        this_update: rcgen::date_time_ymd(2020, 1, 1),
        next_update: rcgen::date_time_ymd(2099, 1, 1),
        crl_number: 1u64.into(),
        issuing_distribution_point: None,
        revoked_certs: vec![rcgen::RevokedCertParams {
            serial_number: 3u64.into(),
            revocation_time: rcgen::date_time_ymd(2020, 1, 1),
            reason_code: None,
            invalidity_date: None,
        }],
        key_identifier_method: rcgen::KeyIdMethod::Sha256,
    };
    std::fs::write(at("revoked.pem"), list.signed_by(&ca).unwrap().pem().unwrap()).unwrap();
    let mut house = House::with(
        1,
        &format!(
            "[balancer.tls]\ncert = {:?}\nkey = {:?}\nclient_ca = {:?}\nclient_crl = [{:?}]\n\
             [[balancer.auth.certificates]]\nname = \"batch-*.example\"\nowner = \"batch\"",
            at("edge.pem"),
            at("edge.key"),
            at("clients.pem"),
            at("revoked.pem")
        ),
    )
    .await;
    let request = |identity: Option<&(String, String)>| {
        let certs = reqwest::Certificate::from_pem_bundle(&std::fs::read(at("edge.pem")).unwrap()).unwrap();
        let mut builder = reqwest::Client::builder().no_proxy().tls_certs_only(certs);
        if let Some((cert, key)) = identity {
            builder = builder.identity(reqwest::Identity::from_pem(format!("{cert}{key}").as_bytes()).unwrap());
        }
        let url = format!("https://localhost:{}{CHAT}", house.address.port());
        builder.resolve("localhost", house.address).build().unwrap().post(url).body(chat(false).to_string()).send()
    };
    assert_eq!(request(Some(&batch)).await.unwrap().status(), 200);
    assert_eq!(request(Some(&stranger)).await.unwrap().status(), 401);
    assert_eq!(request(None).await.unwrap().status(), 401);
    assert!(request(Some(&revoked)).await.is_err());
    assert_eq!(house.asked().await.header("x-tidegate-tenant"), Some("batch"));
    assert!(house.metrics().await.contains("tidegate_certificate_not_after_seconds"));
}
