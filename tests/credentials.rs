//! Goal: what a user does about credentials works as the help says: keys and tokens are made, used, rotated and taken back while the balancer
//! runs, and nobody who may come in notices. Method: the real command makes every file; a real balancer in front of nobody serves its list of
//! models, which needs a credential; 64 connections over TLS ask all the while.

use std::{
    fs,
    os::unix::fs::symlink,
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use crate::support::{
    certs,
    cluster::{Cluster, Plan, Registry},
    process::run,
    until,
};

/// Two looks of a second each, and a busy machine.
const SEEN: Duration = Duration::from_secs(15);

/// Runs the command, which has to end well; what it printed.
fn tidegate(words: &str) -> String {
    let (code, out, err) = run(&words.split_whitespace().collect::<Vec<_>>());
    assert_eq!(code, 0, "tidegate {words}\n{out}{err}");
    out.trim().to_owned()
}

fn client(folder: &Path) -> reqwest::Client {
    let roots: Vec<_> = ["v1", "v2"]
        .iter()
        .filter_map(|version| fs::read(folder.join(version).join("ca.pem")).ok())
        .map(|pem| reqwest::Certificate::from_pem(&pem).unwrap())
        .collect();
    reqwest::Client::builder().no_proxy().tls_certs_only(roots).timeout(Duration::from_secs(10)).build().unwrap()
}

/// The status of the list of models for whoever shows this.
async fn status(client: &reqwest::Client, edge: &str, secret: &str) -> u16 {
    let response = client.get(format!("{edge}/v1/models")).bearer_auth(secret).send().await;
    response.map_or(0, |response| response.status().as_u16())
}

#[tokio::test]
async fn keys_and_tokens_work_as_the_help_says_until_they_are_taken_back() {
    let mut plan = Plan::new(Registry::Static, &[]);
    let folder = plan.folder.path().to_owned();
    let at = folder.display();
    let key = tidegate(&format!("key create --file {at}/keys.toml --owner alice --scope inference,metrics"));
    let made = tidegate(&format!("token init --dir {at}"));
    assert!(made.ends_with("token.key") && made.starts_with(&format!("{at}/token.pub")), "{made}");
    let generate = format!(
        "token generate --keys-file {at}/keys.toml --signing-key {at}/token.key --api-key {key} --expire-in 86400"
    );
    let (token, narrow) = (tidegate(&generate), tidegate(&format!("{generate} --scope metrics")));
    let lines = format!(
        "[balancer.auth]\nkeys_file = \"{at}/keys.toml\"\n[balancer.auth.tokens]\npublic_keys = [\"{at}/token.pub\"]\n\
         revoked_file = \"{at}/revoked.toml\"\n\
         [[balancer.policies]]\nname = \"known\"\neffect = \"allow\"\nprincipals = [\"owner:alice\"]\n"
    );
    tidegate(&format!("token revoke nothing-yet --file {at}/revoked.toml"));
    plan.balancer = &lines;
    plan.ghosts = &[("ghost", "ghost")];
    let cluster = Cluster::start(plan).await;
    let (client, edge) = (client(&folder), cluster.edge());
    until("the balancer listens", SEEN, || async { status(&client, &edge, &key).await == 200 }).await;
    assert_eq!(status(&client, &edge, &token).await, 200);
    assert_eq!(status(&client, &edge, &narrow).await, 403, "the token does not have the scope");
    assert_eq!(status(&client, &edge, "tg-nobody").await, 401);

    tidegate(&format!("token revoke {token} --file {at}/revoked.toml"));
    until("the token is refused", SEEN, || async { status(&client, &edge, &token).await == 401 }).await;
    let another = tidegate(&generate);
    assert_eq!(status(&client, &edge, &another).await, 200, "the key is still good");
    let list = tidegate(&format!("key list --file {at}/keys.toml"));
    let id = list.lines().nth(1).unwrap().split_whitespace().next().unwrap();
    let config = folder.join("balancer.toml").display().to_string();
    let asked = |action: &str| {
        run(&[
            "policy",
            "test",
            "--config",
            &config,
            "--as",
            &format!("key:{id}"),
            "--action",
            action,
            "--resource",
            "path:/x",
        ])
    };
    let (code, said, _) = asked("models:list");
    assert!(code == 0 && said.contains("allowed by the policy 'known'"), "{code} {said}");
    let (code, said, _) = asked("members:read");
    assert!(code == 77 && said.contains("scope 'admin'"), "{code} {said}");

    tidegate(&format!("key revoke {id} --file {at}/keys.toml"));
    until("the key is refused", SEEN, || async { status(&client, &edge, &key).await == 401 }).await;
    assert_eq!(status(&client, &edge, &another).await, 401, "its tokens end with it");
    let (code, _, said) = run(&["token", "generate", "--keys-file", &format!("{at}/keys.toml"), "--api-key", &key]);
    assert!(code == 64 && said.contains("good no more"), "{code} {said}");
}

/// Requests of one load, and those of them that failed.
#[derive(Default)]
struct Count {
    asked: AtomicUsize,
    failed: Mutex<Vec<u16>>,
    is_over: AtomicBool,
}

/// How many connections ask at a time.
const CONNECTIONS: usize = 64;
/// How often everything is changed.
const CHANGES: usize = 3;

#[tokio::test]
async fn certificates_keys_and_policies_change_under_load_and_nobody_notices() {
    let mut plan = Plan::new(Registry::Static, &[]);
    let folder = plan.folder.path().to_owned();
    for version in ["v1", "v2"] {
        fs::create_dir(folder.join(version)).unwrap();
        certs::write(&folder.join(version));
    }
    symlink("v1", folder.join("live")).unwrap();
    let at = folder.display();
    let first = tidegate(&format!("key create --file {at}/keys.toml --owner alice"));
    let lines = format!(
        "[balancer.tls]\ncert = \"{at}/live/edge.pem\"\nkey = \"{at}/live/edge.key\"\n[balancer.auth]\nkeys_file = \"{at}/keys.toml\"\n\
         [[balancer.policies]]\nname = \"p\"\neffect = \"allow\"\nprincipals = [\"owner:alice\"]\n"
    );
    plan.balancer = &lines;
    plan.ghosts = &[("ghost", "ghost")];
    plan.tls = true;
    let cluster = Cluster::start(plan).await;
    let (probe, edge) = (client(&folder), cluster.edge());
    until("the balancer listens", SEEN, || async { status(&probe, &edge, &first).await == 200 }).await;

    let (count, key) = (Arc::<Count>::default(), Arc::new(Mutex::new(first)));
    let load: Vec<_> = (0..CONNECTIONS)
        .map(|_| {
            // a client of its own has a connection of its own
            let (client, edge, count, key) = (client(&folder), edge.clone(), Arc::clone(&count), Arc::clone(&key));
            tokio::spawn(async move {
                while !count.is_over.load(SeqCst) {
                    let shown = key.lock().unwrap().clone();
                    let got = status(&client, &edge, &shown).await;
                    count.asked.fetch_add(1, SeqCst);
                    if got != 200 {
                        count.failed.lock().unwrap().push(got);
                    }
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
            })
        })
        .collect();
    let config = folder.join("balancer.toml");
    for change in 0..CHANGES {
        let (version, text) = (if change % 2 == 0 { "v2" } else { "v1" }, fs::read_to_string(&config).unwrap());
        symlink(version, folder.join("next")).unwrap();
        fs::rename(folder.join("next"), folder.join("live")).unwrap();
        let list = tidegate(&format!("key list --file {at}/keys.toml"));
        let id = list.lines().last().unwrap().split_whitespace().next().unwrap().to_owned();
        let next = tidegate(&format!("key rotate {id} --file {at}/keys.toml --overlap 1h"));
        let named = text.replacen(
            &format!("name = \"p{}\"", "x".repeat(change)),
            &format!("name = \"p{}\"", "x".repeat(change + 1)),
            1,
        );
        assert_ne!(text, named);
        fs::write(folder.join("balancer.new"), named).unwrap();
        fs::rename(folder.join("balancer.new"), &config).unwrap();
        until("the new key is known", SEEN, || async { status(&probe, &edge, &next).await == 200 }).await;
        *key.lock().unwrap() = next;
    }
    tokio::time::sleep(Duration::from_secs(1)).await;
    count.is_over.store(true, SeqCst);
    for task in load {
        task.await.unwrap();
    }
    let (asked, failed) = (count.asked.load(SeqCst), count.failed.lock().unwrap().clone());
    assert!(failed.is_empty(), "{} of {asked} failed: {failed:?}", failed.len());
    assert!(asked > 10 * CONNECTIONS, "{asked} requests are no load");
}
