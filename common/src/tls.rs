//! Certificates and keys from PEM files, checked when read, so that nothing downstream meets a bad one.

use std::{
    fmt,
    path::{Path, PathBuf},
    sync::Arc,
};

pub use rustls::ServerConfig;
use rustls::{
    ClientConfig, RootCertStore, SupportedProtocolVersion,
    pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer, pem::PemObject},
    server::{ResolvesServerCert, WebPkiClientVerifier, danger::ClientCertVerifier},
    sign::{CertifiedKey, SingleCertAndKey},
    version::TLS13,
};

/// Makes ring the process's one crypto provider. Two providers land in the dependency graph, and without a choice rustls panics.
pub fn install_provider() {
    // an error means that it was installed before
    let _ = rustls::crypto::ring::default_provider().install_default();
}

/// Why a certificate, key or set of roots cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// The file is not there, not readable, or holds no such thing.
    #[error("{path}: no usable {what} in this PEM file: {reason}")]
    Pem {
        /// Which file.
        path: PathBuf,
        /// What was looked for.
        what: &'static str,
        /// Why it was not found.
        reason: String,
    },
    /// The pieces do not fit together.
    #[error("certificate and key do not make a TLS identity: {0}")]
    Identity(#[from] rustls::Error),
    /// The roots cannot verify anything.
    #[error("{path}: {reason}")]
    Roots {
        /// Which file.
        path: PathBuf,
        /// Why not.
        reason: String,
    },
}

/// Least TLS version a listener accepts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MinVersion {
    /// TLS 1.2 and 1.3.
    Tls12,
    /// TLS 1.3 only.
    Tls13,
}

impl MinVersion {
    fn versions(self) -> &'static [&'static SupportedProtocolVersion] {
        static ONLY_13: [&SupportedProtocolVersion; 1] = [&TLS13];
        match self {
            Self::Tls12 => rustls::ALL_VERSIONS,
            Self::Tls13 => &ONLY_13,
        }
    }
}

/// A certificate chain with its key.
#[derive(Debug)]
pub struct Identity {
    /// The chain, leaf first.
    pub chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
}

impl Identity {
    /// Reads a chain and its key from PEM files.
    ///
    /// # Errors
    /// When either file has no such thing in it.
    pub fn read(cert: &Path, key: &Path) -> Result<Self, TlsError> {
        let chain = read_certs(cert)?;
        let key = PrivateKeyDer::from_pem_file(key).map_err(|e| TlsError::Pem {
            path: key.to_owned(),
            what: "private key",
            reason: e.to_string(),
        })?;
        Ok(Self { chain, key })
    }

    /// What a server shows and signs with.
    ///
    /// # Errors
    /// When certificate and key do not fit.
    pub fn certified(&self) -> Result<CertifiedKey, TlsError> {
        let provider = rustls::crypto::CryptoProvider::get_default().expect("a provider is installed first");
        Ok(CertifiedKey::from_der(self.chain.clone(), self.key.clone_key(), provider)?)
    }

    /// The same for clients of any name.
    ///
    /// # Errors
    /// When certificate and key do not fit.
    pub fn resolver(&self) -> Result<Arc<dyn ResolvesServerCert>, TlsError> {
        Ok(Arc::new(SingleCertAndKey::from(self.certified()?)))
    }

    /// The key in DER form.
    pub fn key(&self) -> &PrivateKeyDer<'static> {
        &self.key
    }
}

/// All certificates of a PEM file, of which there must be one.
///
/// # Errors
/// When the file holds none.
pub fn read_certs(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let fail = |reason: String| TlsError::Pem { path: path.to_owned(), what: "certificate", reason };
    let certs = CertificateDer::pem_file_iter(path).map_err(|e| fail(e.to_string()))?;
    let certs = certs.collect::<Result<Vec<_>, _>>().map_err(|e| fail(e.to_string()))?;
    if certs.is_empty() { Err(fail("the file is empty".into())) } else { Ok(certs) }
}

/// Root certificates to verify the other side by.
///
/// # Errors
/// When the file holds none that can serve as a root.
pub fn read_roots(path: &Path) -> Result<Arc<RootCertStore>, TlsError> {
    let mut roots = RootCertStore::empty();
    for cert in read_certs(path)? {
        roots.add(cert).map_err(|e| TlsError::Roots { path: path.to_owned(), reason: e.to_string() })?;
    }
    Ok(Arc::new(roots))
}

/// Whose certificates a server takes of its clients.
#[derive(Debug, Clone)]
pub struct Clients {
    /// Who signs them.
    pub ca: PathBuf,
    /// Lists of those that were taken back (CRL, PEM).
    pub revoked: Vec<PathBuf>,
    /// Whether a client without one is turned away.
    pub is_required: bool,
}

impl Clients {
    /// Only clients with a certificate of this CA.
    pub fn of(ca: &Path) -> Self {
        Self { ca: ca.to_owned(), revoked: Vec::new(), is_required: true }
    }

    fn verifier(&self) -> Result<Arc<dyn ClientCertVerifier>, TlsError> {
        let mut builder = WebPkiClientVerifier::builder(read_roots(&self.ca)?);
        for path in &self.revoked {
            let fail = |e: &dyn fmt::Display| TlsError::Pem {
                path: path.clone(),
                what: "certificate revocation list",
                reason: e.to_string(),
            };
            let lists = CertificateRevocationListDer::pem_file_iter(path).map_err(|e| fail(&e))?;
            builder = builder.with_crls(lists.collect::<Result<Vec<_>, _>>().map_err(|e| fail(&e))?);
        }
        if !self.revoked.is_empty() {
            // a list of the authority that signs clients says nothing of authorities above it
            builder = builder.only_check_end_entity_revocation();
        }
        if !self.is_required {
            builder = builder.allow_unauthenticated();
        }
        builder.build().map_err(|e| TlsError::Roots { path: self.ca.clone(), reason: e.to_string() })
    }
}

/// A server's TLS, and which clients it serves.
///
/// # Errors
/// When a file cannot be used.
pub fn server_config(
    certificates: Arc<dyn ResolvesServerCert>,
    min: MinVersion,
    clients: Option<&Clients>,
) -> Result<ServerConfig, TlsError> {
    let builder = ServerConfig::builder_with_protocol_versions(min.versions());
    let builder = match clients {
        None => builder.with_no_client_auth(),
        Some(clients) => builder.with_client_cert_verifier(clients.verifier()?),
    };
    let mut config = builder.with_cert_resolver(certificates);
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(config)
}

/// A client's TLS: trusts `ca` alone, shows `identity` when the server asks.
///
/// # Errors
/// When certificate and key do not fit, or a file cannot be used.
pub fn client_config(ca: &Path, identity: Option<&Identity>) -> Result<ClientConfig, TlsError> {
    let builder = ClientConfig::builder().with_root_certificates(read_roots(ca)?);
    Ok(match identity {
        None => builder.with_no_client_auth(),
        Some(identity) => builder.with_client_auth_cert(identity.chain.clone(), identity.key.clone_key())?,
    })
}
