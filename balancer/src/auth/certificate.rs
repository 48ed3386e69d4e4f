//! Clients known by the certificate that they show in the TLS handshake, which has verified it against `balancer.tls.client_ca`.

use std::{any::Any, sync::Arc};

use async_trait::async_trait;
use pingora::{
    listeners::TlsAccept,
    protocols::{http::ServerSession, tls::TlsRef},
};
use tidegate_common::config::Reader;
use x509_parser::{certificate::X509Certificate, extensions::GeneralName, prelude::FromDer};

use super::{Credential, CredentialKind, Grant, Principal, keys::is_owner};
use crate::pattern::Pattern;

/// The names in a verified certificate: of the subject alternative names those of hosts, URIs and mail, then the subject's common name.
#[derive(Debug, PartialEq, Eq)]
struct Shown(Vec<String>);

/// Reads the client's certificate after each handshake.
pub(crate) struct ReadCertificate;

#[async_trait]
impl TlsAccept for ReadCertificate {
    async fn handshake_complete_callback(&self, tls: &TlsRef) -> Option<Arc<dyn Any + Send + Sync>> {
        Some(Arc::new(Shown::read(tls.peer_certificate_der()?)?))
    }
}

impl Shown {
    fn read(der: &[u8]) -> Option<Self> {
        let (_, certificate) = X509Certificate::from_der(der).ok()?;
        let mut names = Vec::new();
        if let Ok(Some(alternative)) = certificate.subject_alternative_name() {
            names.extend(alternative.value.general_names.iter().filter_map(|name| match name {
                GeneralName::DNSName(name) | GeneralName::URI(name) | GeneralName::RFC822Name(name) => {
                    Some((*name).to_owned())
                }
                _ => None,
            }));
        }
        let common = certificate.subject().iter_common_name().filter_map(|name| name.as_str().ok());
        names.extend(common.map(str::to_owned));
        Some(Self(names))
    }
}

/// Whom certificates are for.
pub(super) struct Certificates(Vec<Entry>);

struct Entry {
    name: Pattern,
    owner: Arc<str>,
    grant: Arc<Grant>,
}

impl Certificates {
    /// Reads each `[[balancer.auth.certificates]]`.
    pub(super) fn read(r: &Reader<'_>) -> Self {
        Self(r.sections("certificates").iter().filter_map(Entry::read).collect())
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Who has shown a certificate on this connection, where that is known.
    pub(super) fn principal(&self, session: &ServerSession) -> Option<Arc<Principal>> {
        let digest = session.digest()?.ssl_digest.as_ref()?;
        self.find(digest.extension.get::<Shown>()?)
    }

    fn find(&self, shown: &Shown) -> Option<Arc<Principal>> {
        let named = |entry: &Entry| shown.0.iter().find(|name| entry.name.matches(name)).cloned();
        let (entry, name) = self.0.iter().find_map(|entry| Some((entry, named(entry)?)))?;
        Some(Arc::new(Principal {
            credential: Credential { kind: CredentialKind::Certificate, id: name.into() },
            owner: Arc::clone(&entry.owner),
            grant: Arc::clone(&entry.grant),
            bound: None,
            roles: Vec::new(),
        }))
    }
}

impl Entry {
    fn read(r: &Reader<'_>) -> Option<Self> {
        let (name, owner, grant) = (r.parse::<Pattern>("name"), r.get::<String>("owner"), Grant::read(r));
        for key in ["name", "owner"].into_iter().filter(|key| !r.has(key)) {
            r.problem(key, "is missing", "every certificate needs the name in it, and an owner");
        }
        if owner.as_ref().is_some_and(|owner| !is_owner(owner)) {
            r.problem("owner", "is not a name of printable ASCII without spaces", "choose a short name");
        }
        Some(Self { name: name?, owner: owner?.into(), grant: Arc::new(grant) })
    }
}

#[cfg(test)]
mod tests {
    use tidegate_common::config::Raw;

    use super::*;

    #[test]
    fn the_first_entry_that_names_a_certificate_says_whose_it_is() {
        let key = rcgen::KeyPair::generate().unwrap();
        let mut params = rcgen::CertificateParams::new(vec!["batch-1.example.net".into()]).unwrap();
        params.distinguished_name.push(rcgen::DnType::CommonName, "batch");
        let certificate = params.self_signed(&key).unwrap();
        let shown = Shown::read(certificate.der()).unwrap();
        assert!(
            shown.0.contains(&"batch-1.example.net".to_owned()) && shown.0.contains(&"batch".to_owned()),
            "{shown:?}"
        );
        let text = "[[certificates]]\nname = \"other\"\nowner = \"nobody\"\n\
            [[certificates]]\nname = \"batch-*.example.net\"\nowner = \"batch\"\nscopes = [\"metrics\"]";
        let known = Raw::from_toml(text, "t").unwrap().check(Certificates::read).unwrap();
        let principal = known.find(&shown).unwrap();
        assert_eq!((&*principal.owner, &*principal.credential.id), ("batch", "batch-1.example.net"));
        assert!(known.find(&Shown(vec!["batch".into()])).is_none());
    }
}
