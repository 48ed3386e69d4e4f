//! The members last known, kept in a file: what a balancer that starts while etcd is away begins with.
//!
//! What stands there is no more than a hint where to look: such a member takes requests when its probes have passed, like any other. A
//! file that cannot be read or written is a warning, for a balancer is of use without it.

use std::{
    collections::BTreeMap,
    fs,
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use tidegate_common::{
    config::{ClusterConfig, Reader, RegistryConfig},
    contract::{KNOWN_MEMBERS_VERSION, KnownMembers, NodeRecord},
    data_dir,
    ids::{ClusterName, NodeId},
    registry::{Link, View},
};
use tokio::{sync::watch, task::spawn_blocking};
use tracing::{info, warn};

/// `balancer.members_file`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum MembersFile {
    /// In Tidegate's own folder, so that losing etcd is a non-event without anybody's having thought of it.
    Default,
    /// Here.
    At(PathBuf),
    /// Nowhere.
    Off,
}

impl MembersFile {
    pub(crate) fn read(r: &Reader<'_>) -> Self {
        match r.get::<PathBuf>("members_file") {
            None => Self::Default,
            Some(word) if word == Path::new("off") => Self::Off,
            Some(path) => Self::At(path),
        }
    }

    /// The file, for a registry that can be lost. Two clusters on one machine have two.
    fn path(&self, cluster: &ClusterConfig) -> Option<PathBuf> {
        match (self, &cluster.registry) {
            (Self::Off, _) | (_, RegistryConfig::Memory | RegistryConfig::Static { .. }) => None,
            (Self::At(path), RegistryConfig::Etcd(_)) => Some(path.clone()),
            (Self::Default, RegistryConfig::Etcd(_)) => match data_dir::default() {
                Ok(dir) => Some(dir.join("state").join(format!("members-{}.json", cluster.name))),
                Err(error) => {
                    warn!(error, "no folder to keep the last known members in; set balancer.members_file");
                    None
                }
            },
        }
    }
}

/// The members last known.
pub(crate) struct Remembered {
    /// What the file said, until the registry speaks for itself.
    recalled: BTreeMap<NodeId, NodeRecord>,
    /// What the file says; a change is written.
    kept: watch::Sender<Vec<NodeRecord>>,
}

impl Remembered {
    /// Reads the file, and writes it from now on. Must be called within the runtime.
    pub(crate) fn open(file: &MembersFile, cluster: &ClusterConfig) -> Self {
        let Some(path) = file.path(cluster) else { return Self::of(Vec::new()) };
        let records = read(&path, &cluster.name).unwrap_or_else(|reason| {
            warn!(path = %path.display(), reason, "the file of last known members cannot be used");
            Vec::new()
        });
        let this = Self::of(records);
        tokio::spawn(keep(path, cluster.name.clone(), this.kept.subscribe()));
        this
    }

    fn of(records: Vec<NodeRecord>) -> Self {
        let recalled = records.iter().map(|record| (record.id.clone(), record.clone())).collect();
        Self { recalled, kept: watch::Sender::new(records) }
    }

    /// The view to go by: the registry's own, but for one that was out of reach from the start.
    pub(crate) fn complete(&mut self, mut view: View) -> View {
        match view.link {
            Link::Live => self.recalled.clear(),
            Link::Lost if view.nodes.is_empty() && !self.recalled.is_empty() => {
                info!(nodes = self.recalled.len(), "starting from the members last known");
                view.nodes.clone_from(&self.recalled);
            }
            Link::Lost | Link::Connecting => {}
        }
        view
    }

    /// These are the members now. Nobody is nothing to begin with, so the last that were somebody stay.
    pub(crate) fn note<'a>(&self, members: impl Iterator<Item = &'a NodeRecord> + Clone) {
        self.kept.send_if_modified(|kept| {
            let is_news = members.clone().next().is_some() && !members.clone().eq(kept.iter());
            if is_news {
                *kept = members.cloned().collect();
            }
            is_news
        });
    }
}

/// Writes each change, in its own time: a disk that hangs must not hold up who follows the probes.
async fn keep(path: PathBuf, cluster: ClusterName, mut changes: watch::Receiver<Vec<NodeRecord>>) {
    while changes.changed().await.is_ok() {
        let nodes = changes.borrow_and_update().clone();
        let known = KnownMembers { v: KNOWN_MEMBERS_VERSION, cluster: cluster.clone(), nodes };
        let to = path.clone();
        if let Ok(Err(error)) = spawn_blocking(move || write(&to, &known)).await {
            warn!(path = %path.display(), %error, "the last known members cannot be written");
        }
    }
}

/// No file is no member.
fn read(path: &Path, cluster: &ClusterName) -> Result<Vec<NodeRecord>, String> {
    let text = match fs::read(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        text => text.map_err(|e| e.to_string())?,
    };
    let known: KnownMembers = serde_json::from_slice(&text).map_err(|e| e.to_string())?;
    if known.v > KNOWN_MEMBERS_VERSION {
        return Err(format!("it was written by a later release (version {})", known.v));
    }
    if known.cluster != *cluster {
        return Err(format!("it is of the cluster '{}'", known.cluster));
    }
    Ok(known.nodes)
}

/// Whole or not at all, also when the power goes: a new file takes the old one's place once it is on the disk.
fn write(path: &Path, known: &KnownMembers) -> io::Result<()> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    fs::create_dir_all(folder)?;
    // balancers of one machine may share the file
    let new = path.with_extension(format!("{}.new", std::process::id()));
    let mut file = fs::OpenOptions::new().create(true).write(true).truncate(true).mode(0o600).open(&new)?;
    serde_json::to_writer(&mut file, known)?;
    file.write_all(b"\n")?;
    file.sync_all()?;
    fs::rename(new, path)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn records(ids: &[&str]) -> Vec<NodeRecord> {
        ids.iter().map(|id| NodeRecord::new(id.parse().unwrap(), "127.0.0.1:1".into(), "m".into())).collect()
    }

    fn view(ids: &[&str], link: Link) -> View {
        View { nodes: records(ids).into_iter().map(|r| (r.id.clone(), r)).collect(), link }
    }

    fn cluster() -> ClusterName {
        "c".parse().unwrap()
    }

    #[test]
    fn what_is_remembered_counts_only_until_the_registry_speaks() {
        let mut remembered = Remembered::of(records(&["a", "b"]));
        let nobody = |link| view(&[], link);
        assert_eq!(remembered.complete(nobody(Link::Connecting)), nobody(Link::Connecting));
        assert_eq!(remembered.complete(nobody(Link::Lost)), view(&["a", "b"], Link::Lost));
        assert_eq!(remembered.complete(nobody(Link::Lost)), view(&["a", "b"], Link::Lost));
        assert_eq!(remembered.complete(view(&["c"], Link::Live)), view(&["c"], Link::Live));
        assert_eq!(remembered.complete(nobody(Link::Lost)), nobody(Link::Lost), "the registry had its say");
    }

    #[test]
    fn only_news_is_written_and_nobody_is_no_news() {
        let remembered = Remembered::of(records(&["a"]));
        let mut changes = remembered.kept.subscribe();
        for (ids, is_news) in
            [(&["a"][..], false), (&[], false), (&["a", "b"], true), (&["a", "b"], false), (&["b"], true)]
        {
            remembered.note(records(ids).iter());
            assert_eq!(changes.has_changed().unwrap(), is_news, "{ids:?}");
            changes.mark_unchanged();
        }
    }

    #[test]
    fn a_file_reads_back_as_written_and_is_its_owners_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state/members.json");
        assert_eq!(read(&path, &cluster()), Ok(vec![]), "no file is no fault");
        for ids in [&["a", "b"][..], &["c"]] {
            let known = KnownMembers { v: KNOWN_MEMBERS_VERSION, cluster: cluster(), nodes: records(ids) };
            write(&path, &known).unwrap();
            assert_eq!(read(&path, &cluster()), Ok(records(ids)));
        }
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1, "nothing else is left there");
    }

    #[test]
    fn a_broken_file_says_why() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("members.json");
        for (text, why) in [
            ("{\"v\":1,\"clus", "EOF"),
            ("7", "invalid type"),
            (r#"{"v":2,"cluster":"c","nodes":[]}"#, "later release"),
            (r#"{"v":1,"cluster":"d","nodes":[]}"#, "cluster 'd'"),
            (r#"{"v":1,"cluster":"c","nodes":[{"v":1,"id":"../x"}]}"#, "line 1"),
        ] {
            fs::write(&path, text).unwrap();
            let reason = read(&path, &cluster()).unwrap_err();
            assert!(reason.contains(why), "{text}: {reason}");
        }
    }
}
