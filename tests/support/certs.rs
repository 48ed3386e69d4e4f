//! A certificate authority of the test's own.

use std::{fs, path::Path};

use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, KeyUsagePurpose};

/// Who signs.
pub(crate) struct Authority(Issuer<'static, KeyPair>);

/// Writes `ca.pem`, and `edge.pem` with `edge.key` for loopback.
pub(crate) fn write(folder: &Path) {
    Authority::write(folder).issue(folder, "edge", &["localhost", "127.0.0.1"]);
}

impl Authority {
    /// Writes `ca.pem`.
    pub(crate) fn write(folder: &Path) -> Self {
        let key = KeyPair::generate().unwrap();
        let mut ca = CertificateParams::new(Vec::<String>::new()).unwrap();
        ca.distinguished_name.push(DnType::CommonName, "tidegate test CA");
        ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        ca.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        fs::write(folder.join("ca.pem"), ca.self_signed(&key).unwrap().pem()).unwrap();
        Self(Issuer::new(ca, key))
    }

    /// Writes `NAME.pem` with `NAME.key`, for these names and addresses.
    pub(crate) fn issue(&self, folder: &Path, name: &str, subjects: &[&str]) {
        let key = KeyPair::generate().unwrap();
        let subjects: Vec<String> = subjects.iter().map(|&subject| subject.to_owned()).collect();
        let mut leaf = CertificateParams::new(subjects).unwrap();
        // with one name for both, OpenSSL takes the leaf for its own issuer
        leaf.distinguished_name.push(DnType::CommonName, format!("tidegate test {name}"));
        // newer Python refuses a chain without it
        leaf.use_authority_key_identifier_extension = true;
        fs::write(folder.join(format!("{name}.pem")), leaf.signed_by(&key, &self.0).unwrap().pem()).unwrap();
        fs::write(folder.join(format!("{name}.key")), key.serialize_pem()).unwrap();
    }
}
