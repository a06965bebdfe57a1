# Both agents in one image: `docker run … migrated source|target`.
FROM debian:12 AS build
RUN apt-get update && apt-get install -y --no-install-recommends make
WORKDIR /src
COPY . .
RUN make deb

FROM debian:12
COPY --from=build /src/build/dist/*.deb /tmp/
# A target also needs the VMM that its guests run in.
RUN apt-get update \
    && apt-get install -y --no-install-recommends /tmp/*.deb qemu-system-x86 \
    && rm -rf /tmp/*.deb /var/lib/apt/lists/*
# Required to run: --pid=host (guests are processes of the host), --cap-add SYS_PTRACE --cap-add SYS_ADMIN,
# --security-opt seccomp=unconfined (userfaultfd, ptrace, pidfd_getfd), --network=host, --ulimit memlock=-1,
# and -v /run/migrated:/run/migrated so that the command line finds the control socket.
STOPSIGNAL SIGTERM
ENTRYPOINT ["migrated"]
CMD ["--help"]
