//! Encryption at rest, a record at a time: a crash costs the last one alone, and the file grows as a plain one does.
//!
//! A file is [`MAGIC`], a random salt of 32 bytes, then frames: the length of what follows the nonce (u32, big endian), a random nonce of 12
//! bytes, AES-256-GCM's ciphertext and tag. Each file has a key of its own, HKDF-SHA256 of the key file's by the salt, so that random nonces
//! meet within one file only.

use std::io::{self, BufRead, Read};

use ring::{
    aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey},
    hkdf,
};

use super::line::LINE_BYTES_MAX;

/// How an encrypted file begins.
const MAGIC: &[u8; 8] = b"TGAUDIT1";
const SALT_LEN: usize = 32;
/// Bytes before the first frame.
pub(crate) const HEADER_LEN: usize = MAGIC.len() + SALT_LEN;
const INFO: &[&[u8]] = &[b"tidegate audit file"];
/// Plain bytes of a frame when a whole file is encrypted at once.
const CHUNK: usize = 64 << 10;

/// The key of all files. Deliberately without `Debug`.
#[derive(Clone)]
pub(crate) struct MasterKey(hkdf::Prk);

impl MasterKey {
    pub(crate) fn new(key: &[u8; 32]) -> Self {
        Self(hkdf::Prk::new_less_safe(hkdf::HKDF_SHA256, key))
    }

    fn of_file(&self, salt: &[u8]) -> LessSafeKey {
        // the salt goes in as part of what is expanded, since the key is uniform already (RFC 5869, section 3.3)
        let info: [&[u8]; 2] = [INFO[0], salt];
        let okm = self.0.expand(&info, &AES_256_GCM).expect("the length is that of a key");
        LessSafeKey::new(UnboundKey::from(okm))
    }
}

/// Writes the frames of one file.
pub(crate) struct Sealer(LessSafeKey);

impl Sealer {
    /// For a new file, with the bytes it begins with.
    pub(crate) fn begin(master: &MasterKey) -> (Self, [u8; HEADER_LEN]) {
        let salt: [u8; SALT_LEN] = rand::random();
        let mut header = [0; HEADER_LEN];
        header[..MAGIC.len()].copy_from_slice(MAGIC);
        header[MAGIC.len()..].copy_from_slice(&salt);
        (Self(master.of_file(&salt)), header)
    }

    /// For a file that has begun.
    ///
    /// # Errors
    /// When its beginning is none of ours.
    pub(crate) fn go_on(master: &MasterKey, mut file: impl Read) -> io::Result<Self> {
        Ok(Self(master.of_file(&read_salt(&mut file)?)))
    }

    /// Adds one frame.
    pub(crate) fn seal(&self, out: &mut Vec<u8>, plain: &[u8]) {
        let nonce: [u8; NONCE_LEN] = rand::random();
        let length = plain.len() + AES_256_GCM.tag_len();
        out.extend_from_slice(&u32::try_from(length).expect("a record is bounded").to_be_bytes());
        out.extend_from_slice(&nonce);
        let start = out.len();
        out.extend_from_slice(plain);
        let nonce = Nonce::assume_unique_for_key(nonce);
        let tag = self.0.seal_in_place_separate_tag(nonce, Aad::empty(), &mut out[start..]);
        out.extend_from_slice(tag.expect("a record is far below AES-GCM's bound").as_ref());
    }
}

fn read_salt(file: &mut impl Read) -> io::Result<[u8; SALT_LEN]> {
    let mut header = [0; HEADER_LEN];
    file.read_exact(&mut header)?;
    match header.split_first_chunk() {
        Some((magic, salt)) if magic == MAGIC => Ok(salt.try_into().unwrap_or([0; SALT_LEN])),
        _ => Err(io::Error::new(io::ErrorKind::InvalidData, "is not an encrypted audit file")),
    }
}

/// Reads the frames of a file.
pub(crate) struct Frames<R> {
    inner: R,
    keys: Vec<LessSafeKey>,
    plain: Vec<u8>,
    at: usize,
}

impl<R: Read> Frames<R> {
    /// At the file's beginning. Any of the keys may be the file's.
    ///
    /// # Errors
    /// When its beginning is none of ours.
    pub(crate) fn new(mut inner: R, masters: &[MasterKey]) -> io::Result<Self> {
        let salt = read_salt(&mut inner)?;
        let keys = masters.iter().map(|master| master.of_file(&salt)).collect();
        Ok(Self { inner, keys, plain: Vec::new(), at: 0 })
    }

    /// What is read from.
    pub(crate) fn inner_mut(&mut self) -> &mut R {
        &mut self.inner
    }

    /// The next frame's content and how many bytes of the file it takes; `None` at the end.
    ///
    /// # Errors
    /// `UnexpectedEof` when the last frame is not whole, `InvalidData` when one was changed or none of the keys fits.
    pub(crate) fn next(&mut self) -> io::Result<Option<(&[u8], u64)>> {
        let mut length = [0; 4];
        if self.inner.read(&mut length[..1])? == 0 {
            return Ok(None);
        }
        self.inner.read_exact(&mut length[1..])?;
        let length = u32::from_be_bytes(length) as usize;
        if !(AES_256_GCM.tag_len()..=LINE_BYTES_MAX).contains(&length) {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a frame's length was changed"));
        }
        let mut nonce = [0; NONCE_LEN];
        self.inner.read_exact(&mut nonce)?;
        let mut sealed = Vec::new();
        self.inner.by_ref().take(length as u64).read_to_end(&mut sealed)?;
        if sealed.len() < length {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let opened = self.keys.iter().find_map(|key| {
            let mut sealed = sealed.clone();
            let nonce = Nonce::assume_unique_for_key(nonce);
            let length = key.open_in_place(nonce, Aad::empty(), &mut sealed).ok()?.len();
            sealed.truncate(length);
            Some(sealed)
        });
        let wrong = "a frame was changed, or it was written with another key";
        self.plain = opened.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, wrong))?;
        self.at = 0;
        Ok(Some((&self.plain, (4 + NONCE_LEN + length) as u64)))
    }
}

impl<R: Read> Read for Frames<R> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let available = self.fill_buf()?;
        let length = available.len().min(out.len());
        out[..length].copy_from_slice(&available[..length]);
        self.consume(length);
        Ok(length)
    }
}

impl<R: Read> BufRead for Frames<R> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        while self.at == self.plain.len() {
            if self.next()?.is_none() {
                return Ok(&[]);
            }
        }
        Ok(&self.plain[self.at..])
    }

    fn consume(&mut self, amount: usize) {
        self.at = (self.at + amount).min(self.plain.len());
    }
}

/// A whole file's content, encrypted.
pub(crate) fn seal_all(master: &MasterKey, plain: &[u8]) -> Vec<u8> {
    let (sealer, header) = Sealer::begin(master);
    let mut out = header.to_vec();
    plain.chunks(CHUNK).for_each(|chunk| sealer.seal(&mut out, chunk));
    out
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn frames_read_back_and_neither_a_change_nor_a_cut_passes(plain: Vec<u8>, at: prop::sample::Index, cut: bool) {
            let (master, other) = (MasterKey::new(&[1; 32]), MasterKey::new(&[2; 32]));
            let sealed = seal_all(&master, &plain);
            let read = |bytes: &[u8], keys: &[MasterKey]| -> io::Result<Vec<u8>> {
                let mut out = Vec::new();
                Frames::new(bytes, keys)?.read_to_end(&mut out)?;
                Ok(out)
            };
            prop_assert_eq!(read(&sealed, &[other.clone(), master.clone()]).unwrap(), plain.clone());
            prop_assume!(!plain.is_empty());
            prop_assert!(read(&sealed, &[other]).is_err());
            let mut broken = sealed.clone();
            let at = at.index(sealed.len());
            if cut {
                broken.truncate(at);
            } else {
                broken[at] ^= 1;
            }
            let is_between_frames = cut && at == HEADER_LEN;
            prop_assert!(is_between_frames || read(&broken, &[master]).is_err());
        }
    }
}
