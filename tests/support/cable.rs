//! A cable between two processes on one machine. Cut, it carries nothing and says nothing: no connection breaks and none is refused, as
//! when packets are dropped. It needs no rights and no kernel module; real packets are lost in `tests/hosts.rs`.

use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    join,
    net::{TcpListener, TcpStream},
    spawn,
    sync::watch,
};

/// One cable, for as long as its runtime lives.
pub(crate) struct Cable {
    port: u16,
    is_cut: watch::Sender<bool>,
}

impl Cable {
    /// To a port of this machine.
    pub(crate) fn to(port: u16) -> Self {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let (is_cut, state) = watch::channel(false);
        let cable = Self { port: listener.local_addr().unwrap().port(), is_cut };
        spawn(accept(TcpListener::from_std(listener).unwrap(), port, state));
        cable
    }

    /// Its other end.
    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    /// Cuts or mends it.
    pub(crate) fn cut(&self, is_cut: bool) {
        self.is_cut.send_replace(is_cut);
    }
}

async fn accept(listener: TcpListener, port: u16, state: watch::Receiver<bool>) {
    while let Ok((near, _)) = listener.accept().await {
        spawn(carry(near, port, state.clone()));
    }
}

async fn carry(mut near: TcpStream, port: u16, mut state: watch::Receiver<bool>) {
    let _ = state.wait_for(|is_cut| !is_cut).await;
    let Ok(mut far) = TcpStream::connect(("127.0.0.1", port)).await else { return };
    let _ = (near.set_nodelay(true), far.set_nodelay(true));
    let ((near_in, near_out), (far_in, far_out)) = (near.split(), far.split());
    join!(copy(near_in, far_out, state.clone()), copy(far_in, near_out, state));
}

async fn copy(mut from: impl AsyncRead + Unpin, mut to: impl AsyncWrite + Unpin, mut state: watch::Receiver<bool>) {
    let mut bytes = [0; 16 << 10];
    while let Ok(n) = from.read(&mut bytes).await {
        let _ = state.wait_for(|is_cut| !is_cut).await;
        if n == 0 || to.write_all(&bytes[..n]).await.is_err() {
            break;
        }
    }
    let _ = to.shutdown().await;
}
