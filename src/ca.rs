//! `tidegate ca`: a small certificate authority for one cluster, so that balancer, node and etcd can show each other certificates.
//!
//! Everything of an authority follows from its key, its name too, so nothing is ever read back from a certificate.

use std::{
    fs::{self, DirBuilder},
    os::unix::fs::DirBuilderExt,
    path::PathBuf,
    time::{Duration, SystemTime},
};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, PublicKeyData,
};
use sha2::{Digest, Sha256};
use tidegate_common::{
    ids::NodeId,
    replace::{SECRET, replace},
};

use crate::exit::Failure;

/// The authority's own files.
const AUTHORITY: &str = "ca";

const DAY: Duration = Duration::from_secs(24 * 3600);

/// How far a clock that verifies may be behind.
const SKEW: Duration = Duration::from_secs(3600);

/// Make a small certificate authority for a cluster, and certificates for its members
#[derive(Debug, clap::Subcommand)]
#[command(
    after_help = "A certificate is good for both sides of mutual TLS: of a balancer, a node, a member of etcd and its clients.\n\n\
Examples:\n  tidegate ca init certs\n  tidegate ca issue certs host-1 --host 10.0.0.1 --host host-1.example.net"
)]
pub(crate) enum Command {
    /// Make the authority: DIR/ca.pem to give to everybody, and DIR/ca.key to keep
    Init {
        /// Folder of the authority; it is made for its owner alone
        dir: PathBuf,
        /// How long it is good for
        #[arg(long, default_value_t = 3650, value_parser = clap::value_parser!(u16).range(1..=20_000))]
        days: u16,
        /// Make a new one in the place of one that is there; all its certificates are worthless then
        #[arg(long)]
        force: bool,
    },
    /// Make a certificate and its key: DIR/NAME.pem and DIR/NAME.key
    Issue {
        /// Folder of the authority
        dir: PathBuf,
        /// Name of the certificate, and a host's name that it is good for
        name: NodeId,
        /// A name or an address by which others reach the host; as often as there are any
        #[arg(long = "host", value_name = "HOST")]
        hosts: Vec<String>,
        /// How long it is good for
        #[arg(long, default_value_t = 365, value_parser = clap::value_parser!(u16).range(1..=3650))]
        days: u16,
        /// Put it in the place of one that is there
        #[arg(long)]
        force: bool,
    },
}

pub(crate) fn run(command: Command) -> Result<(), Failure> {
    match command {
        Command::Init { dir, days, force } => init(&Folder(dir), days, force),
        Command::Issue { dir, name, hosts, days, force } => issue(&Folder(dir), &name, hosts, days, force),
    }
}

fn init(folder: &Folder, days: u16, force: bool) -> Result<(), Failure> {
    let key = KeyPair::generate().map_err(internal)?;
    let mut authority = authority(&key);
    (authority.not_before, authority.not_after) = valid(days);
    let cert = authority.self_signed(&key).map_err(internal)?;
    folder.keep(AUTHORITY, &key.serialize_pem(), &cert.pem(), force)
}

fn issue(folder: &Folder, name: &NodeId, hosts: Vec<String>, days: u16, force: bool) -> Result<(), Failure> {
    if name.as_str() == AUTHORITY {
        return Err(Failure::usage("'ca' is the authority itself; choose another name"));
    }
    let issuer = folder.issuer()?;
    let key = KeyPair::generate().map_err(internal)?;
    let names = std::iter::once(name.to_string()).chain(hosts).collect::<Vec<_>>();
    let bad = |e| Failure::usage(format!("--host: {} cannot stand in a certificate: {e}", names.join(", ")));
    let mut member = CertificateParams::new(names.clone()).map_err(bad)?;
    member.distinguished_name = DistinguishedName::new();
    member.distinguished_name.push(DnType::CommonName, name.as_str());
    member.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    member.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    member.use_authority_key_identifier_extension = true;
    (member.not_before, member.not_after) = valid(days);
    let cert = member.signed_by(&key, &issuer).map_err(internal)?;
    folder.keep(name.as_str(), &key.serialize_pem(), &cert.pem(), force)
}

/// What an authority is, by its key. Two of them never have one name, so both can be trusted while one takes the other's place.
fn authority(key: &KeyPair) -> CertificateParams {
    let digest = Sha256::digest(key.subject_public_key_info());
    let short: String = digest.iter().take(4).map(|byte| format!("{byte:02x}")).collect();
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, format!("Tidegate cluster CA {short}"));
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params
}

fn valid<T: From<SystemTime>>(days: u16) -> (T, T) {
    let now = SystemTime::now();
    ((now - SKEW).into(), (now + DAY * u32::from(days)).into())
}

fn internal(error: rcgen::Error) -> Failure {
    Failure::internal(format!("cannot make a certificate: {error}"))
}

/// Where certificates and keys are kept.
struct Folder(PathBuf);

impl Folder {
    fn files(&self, name: &str) -> (PathBuf, PathBuf) {
        (self.0.join(format!("{name}.pem")), self.0.join(format!("{name}.key")))
    }

    fn issuer(&self) -> Result<Issuer<'static, KeyPair>, Failure> {
        let (_, path) = self.files(AUTHORITY);
        let unusable = |e: &dyn std::fmt::Display| {
            let (path, dir) = (path.display(), self.0.display());
            Failure::usage(format!(
                "{path}: no usable key of an authority: {e}\n  fix: make one with `tidegate ca init {dir}`"
            ))
        };
        let pem = fs::read_to_string(&path).map_err(|e| unusable(&e))?;
        let key = KeyPair::from_pem(&pem).map_err(|e| unusable(&e))?;
        Ok(Issuer::new(authority(&key), key))
    }

    /// Writes both files, the key for its owner alone, and says where they are.
    fn keep(&self, name: &str, key: &str, cert: &str, force: bool) -> Result<(), Failure> {
        let (cert_path, key_path) = self.files(name);
        if let Some(there) = [&cert_path, &key_path].into_iter().find(|path| !force && path.exists()) {
            let fix = "choose another name, or say --force to put a new one in its place";
            return Err(Failure::usage(format!("{} is there already\n  fix: {fix}", there.display())));
        }
        let made = DirBuilder::new().recursive(true).mode(0o700).create(&self.0);
        let kept = made
            .and_then(|()| replace(&key_path, key.as_bytes(), SECRET))
            .and_then(|()| replace(&cert_path, cert.as_bytes(), 0o644));
        kept.map_err(|e| Failure::unavailable(format!("{}: cannot be written: {e}", self.0.display())))?;
        println!("{}\n{}", cert_path.display(), key_path.display());
        Ok(())
    }
}
