//! How the command ends: an exit code after sysexits.h, and one message on standard error that names the cause.

use std::process::ExitCode;

use tidegate_balancer::RunError;
use tidegate_common::{config::Problems, registry::OpenError, trace::TelemetryError};
use tidegate_node::{
    RunError as NodeError,
    models::{InvalidRef, ModelError},
    served::ServeError,
};

/// Why the command did not do what it was asked.
#[derive(Debug)]
pub(crate) struct Failure {
    kind: Kind,
    message: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// The user's configuration or arguments.
    Usage = 64,
    /// Something needed is out of reach.
    Unavailable = 69,
    /// Ours.
    Internal = 70,
    /// The answer to a question is no.
    Denied = 77,
    /// A second signal ended it before it was done.
    Cut = 130,
}

impl Failure {
    /// Bad configuration or arguments.
    pub(crate) fn usage(message: impl Into<String>) -> Self {
        Self { kind: Kind::Usage, message: message.into() }
    }

    /// A service or resource is out of reach.
    pub(crate) fn unavailable(message: impl Into<String>) -> Self {
        Self { kind: Kind::Unavailable, message: message.into() }
    }

    /// A fault of ours.
    pub(crate) fn internal(message: impl Into<String>) -> Self {
        Self { kind: Kind::Internal, message: message.into() }
    }

    /// What was asked about is not allowed.
    pub(crate) fn denied(message: impl Into<String>) -> Self {
        Self { kind: Kind::Denied, message: message.into() }
    }

    /// Ended at once by a second signal.
    pub(crate) fn cut() -> Self {
        Self { kind: Kind::Cut, message: "ended at once, without draining".to_owned() }
    }

    /// Says what happened, and gives the code to exit with.
    pub(crate) fn report(&self) -> ExitCode {
        eprintln!("tidegate: {}", self.message.trim_end());
        ExitCode::from(self.kind as u8)
    }
}

/// Help and version are answers; everything else clap says is a refusal.
pub(crate) fn refused_arguments(refusal: &clap::Error) -> ExitCode {
    // an error means that nobody reads standard output any more
    let _ = refusal.print();
    if refusal.use_stderr() { ExitCode::from(Kind::Usage as u8) } else { ExitCode::SUCCESS }
}

impl From<Problems> for Failure {
    fn from(problems: Problems) -> Self {
        Self::usage(problems.to_string())
    }
}

impl From<OpenError> for Failure {
    fn from(error: OpenError) -> Self {
        Self::usage(error.to_string())
    }
}

impl From<InvalidRef> for Failure {
    fn from(error: InvalidRef) -> Self {
        Self::usage(error.to_string())
    }
}

impl From<ModelError> for Failure {
    fn from(error: ModelError) -> Self {
        Self::unavailable(error.to_string())
    }
}

impl From<RunError> for Failure {
    fn from(error: RunError) -> Self {
        match error {
            RunError::AddressInUse { .. } | RunError::Listen { .. } => Self::unavailable(format!(
                "{error}\n  fix: stop what listens there, or choose another address (--listen)"
            )),
            RunError::NoPredecessor { .. } => Self::unavailable(format!(
                "{error}\n  fix: start it without --upgrade, or name the running one's balancer.upgrade_socket"
            )),
            RunError::NotReady { .. } => {
                Self::unavailable(format!("{error}\n  fix: the running balancer goes on; see this one's log"))
            }
            RunError::NoUpgradeSocket => {
                Self::usage(format!("{error}\n  fix: name a path for it in a folder of its own"))
            }
            RunError::Audit { .. } => Self::unavailable(format!(
                "{error}\n  fix: name a folder that this user may write, or remove [balancer.audit]"
            )),
            RunError::UpgradeSocket { .. } => Self::usage(error.to_string()),
            RunError::Telemetry(_) => Self::usage(error.to_string()),
            RunError::Tls(_) => Self::usage(error.to_string()),
            RunError::Setup(_) | RunError::Ended(_) => Self::internal(error.to_string()),
        }
    }
}

impl From<TelemetryError> for Failure {
    fn from(error: TelemetryError) -> Self {
        Self::usage(error.to_string())
    }
}

impl From<NodeError> for Failure {
    fn from(error: NodeError) -> Self {
        match error {
            NodeError::Listen { .. } => Self::unavailable(format!(
                "{error}\n  fix: stop what listens there, or choose another address (--listen, --admin-listen)"
            )),
            NodeError::Serve(ServeError::Model(error)) => error.into(),
            NodeError::Tls(_)
            | NodeError::Serve(ServeError::Load(_) | ServeError::TooLarge { .. } | ServeError::NoRoom { .. }) => {
                Self::usage(error.to_string())
            }
            NodeError::Serve(ServeError::Internal(_)) | NodeError::Internal(_) => Self::internal(error.to_string()),
        }
    }
}
