//! A certificate authority of the test's own.

use std::{fs, path::Path};

use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, KeyUsagePurpose};

/// Writes `ca.pem`, and `edge.pem` with `edge.key` for loopback.
pub(crate) fn write(folder: &Path) {
    let ca_key = KeyPair::generate().unwrap();
    let mut ca = CertificateParams::new(Vec::<String>::new()).unwrap();
    ca.distinguished_name.push(DnType::CommonName, "tidegate test CA");
    ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    ca.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    fs::write(folder.join("ca.pem"), ca.self_signed(&ca_key).unwrap().pem()).unwrap();
    let issuer = Issuer::new(ca, ca_key);
    let key = KeyPair::generate().unwrap();
    let mut edge = CertificateParams::new(vec!["localhost".to_owned(), "127.0.0.1".to_owned()]).unwrap();
    // with one name for both, OpenSSL takes the leaf for its own issuer
    edge.distinguished_name.push(DnType::CommonName, "tidegate test edge");
    // newer Python refuses a chain without it
    edge.use_authority_key_identifier_extension = true;
    fs::write(folder.join("edge.pem"), edge.signed_by(&key, &issuer).unwrap().pem()).unwrap();
    fs::write(folder.join("edge.key"), key.serialize_pem()).unwrap();
}
