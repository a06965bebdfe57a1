# Both agents in one image: `docker run … migrated source|target`.
# The build steps are those in the README: make deps, then pip install of the checkout.
FROM debian:12 AS build
RUN apt-get update && apt-get install -y --no-install-recommends make && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
RUN make deps WITHOUT_TEST_PACKAGES=1
RUN python3 -m venv /opt/migrated && /opt/migrated/bin/pip install --no-cache-dir .

FROM debian:12
# Runtime dependencies of the agents.  A target also needs the VMM that its guests run in.
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 libssl3 libzstd1 qemu-system-x86 \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/migrated /opt/migrated
COPY config/source.toml config/target.toml /etc/migrated/
ENV PATH=/opt/migrated/bin:$PATH
# Required to run: --pid=host (guests are processes of the host), --cap-add SYS_PTRACE --cap-add SYS_ADMIN,
# --security-opt seccomp=unconfined (userfaultfd, ptrace, pidfd_getfd), --network=host, --ulimit memlock=-1,
# and -v /run/migrated:/run/migrated so that the command line finds the control socket.
STOPSIGNAL SIGTERM
ENTRYPOINT ["migrated"]
CMD ["--help"]
