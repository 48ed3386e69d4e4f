//! Telling systemd how this process stands; see sd_notify(3). Without systemd nobody is told.

use std::{
    env,
    ffi::OsStr,
    io,
    os::{
        linux::net::SocketAddrExt,
        unix::{
            ffi::OsStrExt,
            net::{SocketAddr, UnixDatagram},
        },
    },
};

use tracing::debug;

/// This process serves, and is the service's main one: so it may have taken the place of another.
pub fn ready() {
    let Some(socket) = env::var_os("NOTIFY_SOCKET") else { return };
    let words = format!("READY=1\nMAINPID={}\n", std::process::id());
    if let Err(error) = tell(&socket, words.as_bytes()) {
        debug!(%error, "cannot tell systemd");
    }
}

fn tell(socket: &OsStr, words: &[u8]) -> io::Result<()> {
    let address = match socket.as_bytes() {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
        _ => SocketAddr::from_pathname(socket)?,
    };
    UnixDatagram::unbound()?.send_to_addr(words, &address).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_reach_a_socket_by_its_path_and_by_its_abstract_name() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("notify");
        let name = format!("tidegate-test-{}", std::process::id());
        let by_path = UnixDatagram::bind(&path).unwrap();
        let by_name = UnixDatagram::bind_addr(&SocketAddr::from_abstract_name(&name).unwrap()).unwrap();
        tell(path.as_os_str(), b"READY=1\n").unwrap();
        tell(OsStr::new(&format!("@{name}")), b"READY=1\n").unwrap();
        for socket in [by_path, by_name] {
            let mut got = [0; 32];
            let length = socket.recv(&mut got).unwrap();
            assert_eq!(&got[..length], b"READY=1\n");
        }
    }
}
