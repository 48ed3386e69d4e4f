//! A new process takes a balancer's place without a refused connection: the old one offers its listening sockets on a unix socket in a
//! private folder, the new one takes them, and only when it is ready to serve does the old one stop accepting.
//!
//! The talk is of single bytes. Old: [`PUBLIC`] or [`PRIVATE`] with one descriptor each, as often as there are sockets, then whether it
//! has ready members, [`HAS_READY`] or [`HAS_NONE`]. New, once it serves: [`TAKEN`]. An end before that means that nothing has changed:
//! whatever becomes of the new one, the old one goes on.

use std::{
    fs::{self, DirBuilder, Permissions},
    io::{self, IoSlice, IoSliceMut, Read, Write},
    mem::MaybeUninit,
    net::{SocketAddr, TcpListener},
    os::{
        fd::{AsFd, OwnedFd},
        unix::{
            fs::{DirBuilderExt, PermissionsExt},
            net::{UnixListener, UnixStream},
        },
    },
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    recvmsg, sendmsg,
};
use tidegate_common::{config::Reader, data_dir};
use tokio::{
    task::spawn_blocking,
    time::{Instant, timeout_at},
};
use tracing::{debug, info, warn};

use crate::{pool::PoolView, run::RunError};

/// A socket that serves clients comes with this byte.
const PUBLIC: u8 = b'e';
/// The private listener's socket comes with this byte.
const PRIVATE: u8 = b'a';
/// All have come, and the old one has members that take requests.
const HAS_READY: u8 = b'R';
/// All have come, and no member is ready for the old one either.
const HAS_NONE: u8 = b'N';
/// The new one serves.
const TAKEN: u8 = b't';

/// How long the new one may take until a member is ready.
const READY_WITHIN: Duration = Duration::from_secs(10);
/// How long the other side may stay silent.
const SILENCE_MAX: Duration = Duration::from_secs(30);

/// `balancer.upgrade_socket`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum UpgradeSocket {
    /// In Tidegate's own folder, with a name of its own for each private listener.
    Default,
    /// Here.
    At(PathBuf),
    /// Nowhere: no process can take this one's place.
    Off,
}

impl UpgradeSocket {
    pub(crate) fn read(r: &Reader<'_>) -> Self {
        match r.get::<PathBuf>("upgrade_socket") {
            None => Self::Default,
            Some(word) if word == Path::new("off") => Self::Off,
            Some(path) => Self::At(path),
        }
    }

    /// Where the sockets are offered.
    pub(crate) fn path(&self, admin: SocketAddr) -> Option<PathBuf> {
        match self {
            Self::Off => None,
            Self::At(path) => Some(path.clone()),
            // a port that the system chooses is not known to the next process
            Self::Default if admin.port() == 0 => None,
            Self::Default => {
                let dir = data_dir::default().inspect_err(|error| {
                    warn!(error, "no folder for the upgrade's socket; set balancer.upgrade_socket");
                });
                Some(dir.ok()?.join("run").join(format!("balancer-{}.sock", admin.port())))
            }
        }
    }
}

/// The listening sockets of a balancer.
#[derive(Debug)]
pub(crate) struct Sockets {
    pub(crate) public: Vec<TcpListener>,
    pub(crate) private: Vec<TcpListener>,
}

impl Sockets {
    /// More handles of the same sockets.
    pub(crate) fn try_clone(&self) -> io::Result<Self> {
        let all = |sockets: &[TcpListener]| sockets.iter().map(TcpListener::try_clone).collect::<io::Result<_>>();
        Ok(Self { public: all(&self.public)?, private: all(&self.private)? })
    }

    /// Takes out the one that listens at `address`.
    pub(crate) fn take(sockets: &mut Vec<TcpListener>, address: SocketAddr) -> Option<TcpListener> {
        let at = sockets.iter().position(|socket| socket.local_addr().is_ok_and(|found| found == address))?;
        Some(sockets.swap_remove(at))
    }

    fn send(&self, to: &mut UnixStream, has_ready: bool) -> io::Result<()> {
        let public = self.public.iter().map(|socket| (PUBLIC, socket));
        for (kind, socket) in public.chain(self.private.iter().map(|socket| (PRIVATE, socket))) {
            send_one(to, kind, socket)?;
        }
        to.write_all(&[if has_ready { HAS_READY } else { HAS_NONE }])
    }

    /// The sockets, and whether the sender has ready members.
    fn receive(from: &UnixStream) -> io::Result<(Self, bool)> {
        let mut sockets = Self { public: Vec::new(), private: Vec::new() };
        loop {
            match receive_one(from)? {
                (PUBLIC, Some(socket)) => sockets.public.push(socket.into()),
                (PRIVATE, Some(socket)) => sockets.private.push(socket.into()),
                (HAS_READY, None) => return Ok((sockets, true)),
                (HAS_NONE, None) => return Ok((sockets, false)),
                (other, _) => return Err(io::Error::other(format!("a byte {other} that this build does not know"))),
            }
        }
    }
}

/// One descriptor with each byte, so that there can be any number of them.
fn send_one(to: &UnixStream, kind: u8, socket: &TcpListener) -> io::Result<()> {
    let fds = [socket.as_fd()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut message = SendAncillaryBuffer::new(&mut space);
    if !message.push(SendAncillaryMessage::ScmRights(&fds)) {
        return Err(io::Error::other("no room for a descriptor"));
    }
    sendmsg(to, &[IoSlice::new(&[kind])], &mut message, SendFlags::NOSIGNAL)?;
    Ok(())
}

fn receive_one(from: &UnixStream) -> io::Result<(u8, Option<OwnedFd>)> {
    let mut byte = [0];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut message = RecvAncillaryBuffer::new(&mut space);
    let got = recvmsg(from, &mut [IoSliceMut::new(&mut byte)], &mut message, RecvFlags::CMSG_CLOEXEC)?;
    if got.bytes == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    let mut socket = None;
    for part in message.drain() {
        if let RecvAncillaryMessage::ScmRights(mut fds) = part {
            socket = fds.next();
        }
    }
    Ok((byte[0], socket))
}

/// The process whose place is being taken.
#[derive(Debug)]
pub(crate) struct Predecessor {
    stream: UnixStream,
    has_ready: bool,
}

impl Predecessor {
    /// Asks the balancer that offers its sockets at `path` for them.
    ///
    /// # Errors
    /// When none does, or it breaks off.
    pub(crate) fn ask(path: &Path) -> Result<(Self, Sockets), RunError> {
        let fail = |source| RunError::NoPredecessor { path: path.to_owned(), source };
        let stream = UnixStream::connect(path).map_err(fail)?;
        stream.set_read_timeout(Some(SILENCE_MAX)).map_err(fail)?;
        let (sockets, has_ready) = Sockets::receive(&stream).map_err(fail)?;
        Ok((Self { stream, has_ready }, sockets))
    }

    /// Returns once requests can be served as well as the old process serves them.
    ///
    /// # Errors
    /// When no member is ready in time here, while there are some for the old one.
    pub(crate) async fn is_matched_by(&self, pool: &PoolView) -> Result<(), RunError> {
        let deadline = Instant::now() + READY_WITHIN;
        while self.has_ready && !pool.load().has_ready() {
            let changed = pool.changed();
            if pool.load().has_ready() {
                break;
            }
            timeout_at(deadline, changed).await.map_err(|_| RunError::NotReady { within: READY_WITHIN })?;
        }
        Ok(())
    }

    /// Tells the old process to leave.
    pub(crate) fn dismiss(mut self) {
        match self.stream.write_all(&[TAKEN]) {
            Ok(()) => info!("the balancer before leaves once its streams have ended"),
            Err(error) => warn!(%error, "the balancer before is gone already"),
        }
    }
}

/// Sockets on offer.
#[derive(Debug)]
pub(crate) struct Offer {
    listener: UnixListener,
    path: PathBuf,
    sockets: Arc<Sockets>,
}

impl Offer {
    /// Offers them at `path`, in the place of whoever did so before.
    ///
    /// # Errors
    /// When the folder is not private, or the socket cannot be made.
    pub(crate) fn open(path: &Path, sockets: Sockets) -> io::Result<Self> {
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        make_private(folder)?;
        // beside it first, so that at no moment nobody offers anything
        let beside = path.with_extension(format!("{}", std::process::id()));
        let _ = fs::remove_file(&beside);
        let listener = UnixListener::bind(&beside)?;
        fs::set_permissions(&beside, Permissions::from_mode(0o600))?;
        fs::rename(&beside, path)?;
        Ok(Self { listener, path: path.to_owned(), sockets: Arc::new(sockets) })
    }

    /// Returns once another process serves in this one's place.
    ///
    /// # Cancel safety
    /// A talk that is under way when this is dropped ends without effect.
    pub(crate) async fn taken(self, pool: Arc<PoolView>) -> io::Result<()> {
        self.listener.set_nonblocking(true)?;
        let mut mine = Mine { path: self.path, is_mine: true };
        let listener = tokio::net::UnixListener::from_std(self.listener)?;
        loop {
            let (stream, _) = listener.accept().await?;
            let stream = stream.into_std()?;
            let (sockets, has_ready) = (Arc::clone(&self.sockets), pool.load().has_ready());
            info!("another process asks for the sockets");
            match spawn_blocking(move || hand_over(stream, &sockets, has_ready)).await? {
                Ok(()) => {
                    mine.is_mine = false;
                    return Ok(());
                }
                Err(error) => warn!(%error, "the other process has not taken over; this one goes on"),
            }
        }
    }
}

/// Returns once the other process serves.
fn hand_over(mut stream: UnixStream, sockets: &Sockets, has_ready: bool) -> io::Result<()> {
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(SILENCE_MAX))?;
    stream.set_write_timeout(Some(SILENCE_MAX))?;
    sockets.send(&mut stream, has_ready)?;
    let mut answer = [0];
    stream.read_exact(&mut answer)?;
    if answer[0] == TAKEN { Ok(()) } else { Err(io::Error::other(format!("it answers {}", answer[0]))) }
}

/// The unix socket's path, until another process has one of its own there.
struct Mine {
    path: PathBuf,
    is_mine: bool,
}

impl Drop for Mine {
    fn drop(&mut self) {
        if self.is_mine
            && let Err(error) = fs::remove_file(&self.path)
        {
            debug!(path = %self.path.display(), %error, "cannot remove the upgrade's socket");
        }
    }
}

/// Whoever reaches the socket gets the listeners, so nobody else may.
fn make_private(folder: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
    let mode = fs::metadata(folder)?.permissions().mode() & 0o777;
    if mode & 0o077 != 0 {
        let shown = folder.display();
        let message = format!("{shown} has mode {mode:o}, so others than its owner can reach it; chmod 700 {shown}");
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, message));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listener() -> TcpListener {
        TcpListener::bind("127.0.0.1:0").unwrap()
    }

    #[test]
    fn any_number_of_sockets_comes_over_and_each_still_listens() {
        let sockets = Sockets { public: (0..70).map(|_| listener()).collect(), private: vec![listener()] };
        let addresses: Vec<_> = sockets.public.iter().map(|socket| socket.local_addr().unwrap()).collect();
        let (mut here, there) = UnixStream::pair().unwrap();
        let sender = std::thread::spawn(move || sockets.send(&mut here, true));
        let (mut got, has_ready) = Sockets::receive(&there).unwrap();
        sender.join().unwrap().unwrap();
        assert!(has_ready);
        assert_eq!((got.public.len(), got.private.len()), (70, 1));
        for address in addresses {
            let socket = Sockets::take(&mut got.public, address).expect("it came over");
            let client = std::net::TcpStream::connect(address).unwrap();
            assert_eq!(socket.accept().unwrap().1, client.local_addr().unwrap());
        }
    }

    #[test]
    fn an_end_before_all_is_told_is_an_error() {
        let (here, there) = UnixStream::pair().unwrap();
        send_one(&here, PUBLIC, &listener()).unwrap();
        drop(here);
        assert_eq!(Sockets::receive(&there).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn a_folder_that_others_reach_is_refused_and_a_missing_one_is_made() {
        let folder = tempfile::tempdir().unwrap();
        let (open, new) = (folder.path().join("open"), folder.path().join("new/run"));
        fs::create_dir(&open).unwrap();
        fs::set_permissions(&open, Permissions::from_mode(0o755)).unwrap();
        assert!(make_private(&open).unwrap_err().to_string().contains("mode 755"));
        make_private(&new).unwrap();
        assert_eq!(fs::metadata(&new).unwrap().permissions().mode() & 0o777, 0o700);
    }
}
