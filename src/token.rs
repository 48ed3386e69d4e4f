//! `tidegate token`: short-lived tokens (JWT) made of an API key, signed by a key that the balancer knows the public half of.

use std::{
    io::{self, BufRead},
    path::{Path, PathBuf},
    time::Duration,
};

use rand::RngExt;
use rcgen::{KeyPair, PKCS_ECDSA_P256_SHA256, PKCS_ED25519, PublicKeyData};
use tidegate_balancer::auth::{
    Claims, HashSecret, KeyEntry, KeyHash, KeyState, KeysFile, Pattern, RevokedFile, Scope, SigningKey, TIDEGATE,
    UnixSeconds,
};
use tidegate_common::replace::{SECRET, lock, replace};

use crate::exit::Failure;

/// Make short-lived tokens (JWT) of API keys
#[derive(Debug, clap::Subcommand)]
#[command(
    after_help = "A token may do what its key may, or less, and ends with it at the latest. The balancer needs only the public half of the \
signing key: set balancer.auth.tokens.public_keys.\n\n\
Examples:\n  tidegate token init\n  tidegate token generate --api-key tg-0123 --expire-in 86400\n  \
tidegate token generate --api-key - --expire-in 15m --scope inference --model 'smollm2*'\n  \
tidegate token revoke eyJhbGciOiJFZERTQSJ9.e30.c2ln --file revoked.toml"
)]
pub(crate) enum Command {
    /// Make a key pair that signs tokens: token.key to keep, token.pub for the balancers
    Init {
        /// Where both are written
        #[arg(long, value_name = "DIR", default_value = ".")]
        dir: PathBuf,
        /// EdDSA (Ed25519) or ES256 (ECDSA over P-256)
        #[arg(long, value_enum, default_value_t = Algorithm::Eddsa)]
        algorithm: Algorithm,
        /// Make new ones in the place of those that are there; tokens of the old ones are worthless once token.pub is replaced
        #[arg(long)]
        force: bool,
    },
    /// Make a token of an API key and print it
    Generate(Generate),
    /// Take a token back before it ends by itself
    Revoke {
        /// The token, or its jti
        token: String,
        /// File of what was taken back (balancer.auth.tokens.revoked_file); made with mode 600 when it is not there
        #[arg(long, value_name = "FILE")]
        file: PathBuf,
        /// When a token that is named by its jti would have ended by itself, at the latest
        #[arg(long, value_name = "TIME", default_value = "30d", value_parser = humantime::parse_duration)]
        within: Duration,
    },
}

#[derive(Debug, clap::Args)]
pub(crate) struct Generate {
    /// The API key, or - to read it from standard input
    #[arg(long, value_name = "KEY")]
    api_key: String,
    /// How long the token is good for: seconds, or a time such as 15m or 24h
    #[arg(long, value_name = "TIME", default_value = "3600", value_parser = lifetime)]
    expire_in: Duration,
    /// What it is good for, of what the key is good for; all of that when none is said
    #[arg(long = "scope", value_name = "SCOPE", value_delimiter = ',')]
    scopes: Vec<Scope>,
    /// A model that it may ask for, with * for any characters, of those that the key may; all of those when none is said
    #[arg(long = "model", value_name = "NAME")]
    models: Vec<Pattern>,
    /// File of keys that the key stands in
    #[arg(long, value_name = "FILE", default_value = "keys.toml")]
    keys_file: PathBuf,
    /// Secret that its hashes are keyed with, where they are
    #[arg(long, value_name = "FILE")]
    hash_secret: Option<PathBuf>,
    /// Private key that signs, made by `tidegate token init`
    #[arg(long, value_name = "FILE", default_value = "token.key")]
    signing_key: PathBuf,
    /// Issuer, as balancer.auth.tokens.issuer has it
    #[arg(long, default_value = TIDEGATE)]
    issuer: String,
    /// Audience, as balancer.auth.tokens.audience has it
    #[arg(long, default_value = TIDEGATE)]
    audience: String,
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
pub(crate) enum Algorithm {
    Eddsa,
    Es256,
}

pub(crate) fn run(command: Command) -> Result<(), Failure> {
    match command {
        Command::Init { dir, algorithm, force } => init(&dir, algorithm, force),
        Command::Generate(args) => {
            println!("{}", args.token(UnixSeconds::now())?);
            Ok(())
        }
        Command::Revoke { token, file, within } => revoke(&token, &file, within, UnixSeconds::now()),
    }
}

fn init(dir: &Path, algorithm: Algorithm, force: bool) -> Result<(), Failure> {
    let (private, public) = (dir.join("token.key"), dir.join("token.pub"));
    if let Some(there) = [&private, &public].into_iter().find(|path| !force && path.exists()) {
        return Err(Failure::usage(format!(
            "{} is there already\n  fix: choose another --dir, or say --force",
            there.display()
        )));
    }
    let algorithm = match algorithm {
        Algorithm::Eddsa => &PKCS_ED25519,
        Algorithm::Es256 => &PKCS_ECDSA_P256_SHA256,
    };
    let pair = KeyPair::generate_for(algorithm).map_err(|e| Failure::internal(format!("cannot make a key: {e}")))?;
    let written = replace(&private, pair.serialize_pem().as_bytes(), SECRET)
        .and_then(|()| replace(&public, pair.public_key_pem().as_bytes(), 0o644));
    written.map_err(|e| Failure::unavailable(format!("{}: cannot be written: {e}", dir.display())))?;
    println!("{}\n{}", public.display(), private.display());
    Ok(())
}

impl Generate {
    fn token(&self, now: UnixSeconds) -> Result<String, Failure> {
        let key = self.key(now)?;
        let asked = self.scopes.iter().copied();
        let scopes = if self.scopes.is_empty() { key.grant.scopes } else { asked.collect() };
        if let Some(scope) = scopes.iter().find(|scope| !key.grant.scopes.contains(*scope)) {
            return Err(Failure::usage(format!("--scope: the key {} does not have '{scope}'", key.id)));
        }
        let end = now.after(self.expire_in).ok_or_else(|| Failure::usage("--expire-in: the time is too long"))?;
        let claims = Claims {
            iss: self.issuer.clone(),
            aud: self.audience.clone(),
            sub: key.owner.clone(),
            jti: format!("t-{:032x}", rand::rng().random::<u128>()),
            iat: now,
            nbf: now,
            exp: key.expires.map_or(end, |key_end| key_end.min(end)),
            key: key.id,
            scope: scopes.iter().map(Scope::as_str).collect::<Vec<_>>().join(" "),
            models: (!self.models.is_empty()).then(|| self.models.iter().map(ToString::to_string).collect()),
        };
        let signed = signing_key(&self.signing_key)?.sign(&claims);
        signed.map_err(|e| Failure::usage(format!("{}: {e}", self.signing_key.display())))
    }

    fn key(&self, now: UnixSeconds) -> Result<KeyEntry, Failure> {
        let given = match self.api_key.as_str() {
            "-" => first_line()?,
            key => key.to_owned(),
        };
        let secret = self.hash_secret.as_deref().map(|path| {
            HashSecret::read(path).map_err(|e| Failure::usage(format!("--hash-secret: {}: {e}", path.display())))
        });
        let secret = secret.transpose()?;
        let hashes = [
            Some(KeyHash::of(given.as_bytes(), None)),
            secret.as_ref().map(|s| KeyHash::of(given.as_bytes(), Some(s))),
        ];
        let file = KeysFile::read(&self.keys_file)?;
        let found = file.keys.into_iter().find(|key| hashes.contains(&Some(key.hash)));
        let path = self.keys_file.display();
        let key = found.ok_or_else(|| {
            Failure::usage(format!("--api-key: this key is not in {path}\n  fix: name its file with --keys-file"))
        })?;
        match key.state(now) {
            KeyState::Good => Ok(key),
            KeyState::Expired | KeyState::Revoked => {
                Err(Failure::usage(format!("--api-key: the key {} is good no more", key.id)))
            }
        }
    }
}

fn first_line() -> Result<String, Failure> {
    let mut line = String::new();
    io::stdin().lock().read_line(&mut line).map_err(|e| Failure::unavailable(format!("standard input: {e}")))?;
    Ok(line.trim().to_owned())
}

fn signing_key(path: &Path) -> Result<SigningKey, Failure> {
    let unusable = |e: String| {
        Failure::usage(format!(
            "{}: no key that signs tokens: {e}\n  fix: make one with `tidegate token init`",
            path.display()
        ))
    };
    let pem = std::fs::read_to_string(path).map_err(|e| unusable(e.to_string()))?;
    let pair = KeyPair::from_pem(&pem).map_err(|e| unusable(e.to_string()))?;
    SigningKey::new(pem.as_bytes(), &pair.subject_public_key_info()).map_err(|e| unusable(e.to_string()))
}

fn revoke(token: &str, path: &Path, within: Duration, now: UnixSeconds) -> Result<(), Failure> {
    let (jti, until) = match Claims::peek(token) {
        Some(claims) => (claims.jti, claims.exp),
        None => (token.to_owned(), now.after(within).ok_or_else(|| Failure::usage("--within: the time is too long"))?),
    };
    let fail = |e: io::Error| Failure::unavailable(format!("{}: cannot be written: {e}", path.display()));
    let _lock = lock(path).map_err(fail)?;
    let mut revoked = RevokedFile::read(path)?;
    revoked.0.insert(jti.clone(), until);
    revoked.write(path, now).map_err(fail)?;
    eprintln!("{jti} is good no more, once the balancer has read the file");
    Ok(())
}

fn lifetime(text: &str) -> Result<Duration, String> {
    let time = text.parse().map(Duration::from_secs).ok().or_else(|| humantime::parse_duration(text).ok());
    time.filter(|time| !time.is_zero()).ok_or_else(|| "use seconds, or a time such as 15m or 24h".to_owned())
}
